"""In which order autograd runs a segment backwards under tensor parallelism: forward list -> backward list. No torch.

Autograd runs, of the nodes that are ready, the one created last. So the order follows from when the executor creates
nodes, and this file plays that through:

    run(stage)          the stage's nodes; a tap in front of each norm, before the first stage behind that norm
    launch(reduction)   a join: the next point of the stream, as a buffer that is filled later
    launch, wait        of dispatch and combine: one node each, whose gradient waits and launches

In backward a stage's gradient ends at its tap. The last tap of a point of the stream launches the all-reduce of the
gradients that came to all of them; the join that made the point waits for it and adds. A join is older than the
sub-block that ran while its all-reduce was in flight in forward, so in backward that sub-block runs before the join
waits: the all-reduce of one sub-block's input gradient hides under the backward of the one before.

Serial: the last tap waits at once for what it launched.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from farskip.chain import Point
from farskip.instruction import Do, Instruction
from farskip.stage_graph import COMBINE, DISPATCH, Key, StageGraph, gradient_of, reading_stages, reduction_of


class _Node(NamedTuple):
    """Something that autograd runs; `kind` is run, launch, wait, tap or join."""

    kind: str
    key: Key
    point: Point = Point(-1, 0)


def autograd_order(
    graph: StageGraph, forward: Sequence[Instruction], start: int, stop: int, *, serial: bool
) -> tuple[Instruction, ...]:
    """The backward list of one segment.

    Args:
        graph: a graph with a chain.
        forward: the forward list of layers start..stop-1.
        start: first layer.
        stop: one past the last layer.
        serial: whether every all-reduce is waited for where it is launched.
    """
    created, reads, taps = _nodes(graph, forward, start, stop)
    consumers = dict.fromkeys(created, 0)
    for inputs in reads.values():
        for node in inputs:
            consumers[node] += 1
    ready = [(-created[node], node) for node, count in consumers.items() if not count]
    heapq.heapify(ready)
    steps: list[Instruction] = []
    taps_left = Counter(node.point for node in created if node.kind == "tap")
    while ready:
        _, node = heapq.heappop(ready)
        if node.kind == "run":
            steps.append(Instruction(Do.RUN, node.key))
        elif node.kind in ("launch", "wait"):
            steps.append(Instruction(Do.WAIT if node.kind == "launch" else Do.LAUNCH, node.key))
        elif node.kind == "join" and node.point in taps and not serial:
            steps.append(Instruction(Do.WAIT, taps[node.point]))
        elif node.kind == "tap":
            taps_left[node.point] -= 1
            if not taps_left[node.point]:
                steps.append(Instruction(Do.LAUNCH, taps[node.point]))
                if serial:
                    steps.append(Instruction(Do.WAIT, taps[node.point]))
        for read in reads[node]:
            consumers[read] -= 1
            if not consumers[read]:
                heapq.heappush(ready, (-created[read], read))
    return tuple(steps)


def _nodes(
    graph: StageGraph, forward: Sequence[Instruction], start: int, stop: int
) -> tuple[dict[_Node, int], dict[_Node, list[_Node]], dict[Point, Key]]:
    """When each node is created, what it reads, and the all-reduce of the gradient at each point that is read."""
    chain = graph.chain
    assert chain is not None
    readers = chain.readers(start, stop)
    after = {stage.key: stage.after for stage in graph.of_layers(start, stop)}
    points = {reduction_of(chain, point): point for point in chain.points(start, stop)}
    tap_of = {
        stage: _Node("tap", reading_stages(reader)[0], point)
        for point, found in readers.items()
        for reader in found
        for stage in reading_stages(reader)
    }
    created: dict[_Node, int] = {}
    reads: dict[_Node, list[_Node]] = {}

    def create(node: _Node, inputs: Sequence[_Node]) -> None:
        created[node], reads[node] = len(created), list(inputs)

    def node_of(key: Key) -> _Node:
        return _Node("wait" if key.stage in (DISPATCH, COMBINE) else "run", key)

    entry = Point(start, 0)
    for point in entry_points(readers, start):
        create(_join(point), [])
    newest = _join(entry)
    for step in forward:
        key, needs = step.key, [node_of(other) for other in after[step.key]]
        if key in points:
            if step.do is Do.LAUNCH:
                create(_join(points[key]), [newest, *needs])
                newest = _join(points[key])
        elif step.do is Do.WAIT:
            create(_Node("wait", key), [_Node("launch", key)])
        elif step.do is Do.LAUNCH:
            create(_Node("launch", key), needs)
        elif key in tap_of:
            tap = tap_of[key]
            if tap not in created:
                create(tap, [_join(tap.point)])
            create(_Node("run", key), [tap])
        else:
            create(_Node("run", key), needs)
    return created, reads, {point: gradient_of(found) for point, found in readers.items()}


def entry_points(readers: Iterable[Point], start: int) -> list[Point]:
    """Where the stream enters a segment: the point that leaves something out, if it is read, then the full one."""
    entry = Point(start, 0)
    return [*sorted(point for point in readers if point < entry), entry]


def _join(point: Point) -> _Node:
    return _Node("join", Key(point.layer, ""), point)
