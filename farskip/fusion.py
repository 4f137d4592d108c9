"""Which sums of the residual stream are formed in one op together with the norm that reads them. Data; no torch.

    release_attention    y = x + a, n' = y + s, norm(n')              where only a norm reads n', and none reads y
    release_router       x' = y + (r + s), y + r or y + m, norm(x')
    release_both         the two at once                              where r has landed before attention starts
    add_norm             y = x + a or n' = y + s, and its norm        elsewhere

The next attention reads n', which waits for no routed output; the next router reads x', which waits for r. So the two
are two ops while r is in flight, and can be one where it is not. Their bits are the same.

Rows that travel between ranks in one piece meet the ops at both ends: r may come as rows, which the op that adds it
sums on the way; and where x' is normed for a router, the op takes the gradient of the rows that go out unsummed.

Decided from wiring, segment and schedule, never from the order in which stages happen to run. A value that two norms
read is formed with the first of them; the other one norms it afterwards. What enters a segment or leaves it is a plain
tensor: norms of what enters stand alone, and so do sums that leave.

Legend: see `farskip.residual`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from farskip.instruction import Do, Instruction
from farskip.residual import ADD_N, ADD_X, ADD_Y, MLP_NORM, ROWS, Fusion, Uses, Value, normed_value, partial_base
from farskip.stage import Norm
from farskip.stage_graph import ATTENTION_IN, EXPERTS, MERGE, NORM, Key
from farskip.wiring import ATTENTION, MLP, ROUTED, SHARED, LayerInputs, Source


@dataclass(frozen=True, slots=True)
class FusionPlan:
    """The fused ops of one segment.

    Attributes:
        uses: `farskip.residual.stream_uses`, without the uses that now lie inside an op.
        fusions: for each value that an op makes, the op.
    """

    uses: Uses
    fusions: Mapping[Value, Fusion]


def plan_fusions(
    inputs: Sequence[LayerInputs],
    uses: Uses,
    start: int,
    stop: int,
    fusible: Collection[Norm],
    landed: Collection[int],
    *,
    as_rows: bool = False,
    merged_aside: bool = False,
) -> FusionPlan:
    """Choose the ops of the layers start..stop-1.

    Args:
        inputs: the resolved wiring of the whole model.
        uses: `farskip.residual.stream_uses(inputs)`.
        start: first layer.
        stop: one past the last layer.
        fusible: the norms that ops can take over.
        landed: see `landed_layers`.
        as_rows: whether rows travel between ranks, those of a layer in one piece.
        merged_aside: whether returned rows are summed in a lane beside the one that adds their sum.
    """
    fusions: dict[Value, Fusion] = {}
    inside: set[tuple[Value, str]] = set()
    for layer in range(start, stop):
        leaves = layer + 1 == stop
        behind = _fusions_behind(inputs, uses, layer, fusible, leaves, layer in landed, as_rows, merged_aside)
        for fusion, taken_in in behind:
            fusions |= dict.fromkeys(fusion.makes, fusion)
            inside |= taken_in
    left = {value: tuple(use for use in found if (value, use) not in inside) for value, found in uses.items()}
    return FusionPlan(left, fusions)


def landed_layers(steps: Sequence[Instruction]) -> frozenset[int]:
    """The layers whose routed output is there before the next layer's attention starts.

    Args:
        steps: the forward instructions of one segment.
    """
    position = {step.key: number for number, step in enumerate(steps) if step.do is Do.RUN}
    found = set()
    for key, number in position.items():
        if key.stage == ATTENTION_IN and key.layer:
            starts = position.get(Key(key.layer, NORM[ATTENTION]), number)
            merge, experts = Key(key.layer - 1, MERGE), Key(key.layer - 1, EXPERTS)
            if position.get(merge, position.get(experts, starts)) < starts:
                found.add(key.layer - 1)
    return frozenset(found)


def _fusions_behind(
    inputs: Sequence[LayerInputs],
    uses: Uses,
    layer: int,
    fusible: Collection[Norm],
    leaves: bool,
    landed: bool,
    as_rows: bool,
    merged_aside: bool,
) -> Iterator[tuple[Fusion, set[tuple[Value, str]]]]:
    """The ops that form y of this layer, and x and n of the next one unless they leave; each with the uses inside."""
    blocks, after = inputs[layer].blocks, layer + 1
    x, y = Value(layer, Source.FULL), Value(layer, Source.AFTER_ATTENTION)
    next_x, next_n = Value(after, Source.FULL), Value(after, Source.PARTIAL)
    attention, shared = Value(layer, ATTENTION), Value(layer, SHARED)
    base = partial_base(blocks, inputs[after].left_out) if not leaves and inputs[after].left_out else None

    def first_norm(value: Value) -> Norm | None:
        readers = (Norm(value.layer, use) for use in uses[value] if use in (ATTENTION, MLP_NORM))
        return next((norm for norm in readers if norm in fusible), None)

    of_y, of_x = first_norm(y), None if leaves else first_norm(next_x)
    of_n = first_norm(next_n) if base in ("y", "y+s") else None
    y_is_read = MLP_NORM in uses[y]
    sum_y = ((x, ADD_Y), (attention, ADD_X))
    sum_x = ((Value(layer, MLP if MLP in blocks else ROUTED), ADD_X), *([(shared, ADD_X)] if SHARED in blocks else []))
    r_as_rows = as_rows and not merged_aside and ROUTED in blocks

    if of_n and base == "y+s" and not y_is_read and uses[next_n] == (ATTENTION,):
        inside, normed_n = {(y, ADD_N), (next_n, of_n.name)}, normed_value(of_n, next_n)
        if of_x and landed:
            inside |= {(y, ADD_X), (shared, ADD_N), (next_x, of_x.name)}
            normed_x = normed_value(of_x, next_x)
            makes = (next_x, normed_n, normed_x)
            yield Fusion("release_both", (*sum_y, *sum_x), makes, (of_n, of_x), as_rows=r_as_rows), inside
            return
        yield Fusion("release_attention", (*sum_y, (shared, ADD_N)), (y, normed_n), (of_n,)), inside
    else:
        if of_n and base == "y" and not y_is_read:  # n is y
            inside = {(next_n, of_n.name)} | ({(y, ADD_N)} if len(uses[next_n]) == 1 else set())
            yield Fusion("add_norm", sum_y, (y, normed_value(of_n, next_n)), (of_n,)), inside
        elif of_y:
            yield Fusion("add_norm", sum_y, (y, normed_value(of_y, y)), (of_y,)), {(y, of_y.name)}
        if of_n and base == "y+s":
            sum_n = ((y, ADD_N), (shared, ADD_N))
            yield Fusion("add_norm", sum_n, (next_n, normed_value(of_n, next_n)), (of_n,)), {(next_n, of_n.name)}
    if of_x:
        normed_x = normed_value(of_x, next_x)
        yield (
            Fusion(
                "release_router",
                ((y, ADD_X), *sum_x),
                (next_x, normed_x),
                (of_x,),
                as_rows=r_as_rows,
                by_use=as_rows and ROWS in uses[normed_x],
            ),
            {(next_x, of_x.name)},
        )
