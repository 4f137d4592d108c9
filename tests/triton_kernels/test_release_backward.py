"""The backward of the update that releases the router, in one op: against the chain of separate ops, bit for bit."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farskip.async_autograd import fan_out
from farskip.rows_gradient import RowsGradient
from farskip.triton_kernels.add_rms_norm import norm_backward
from farskip.triton_kernels.dispatch_map import DispatchMap, dispatch_map
from farskip.triton_kernels.permute import permute
from farskip.triton_kernels.release_router import release_router, release_router_backward
from farskip.triton_kernels.release_router_by_use import release_router_by_use
from farskip.triton_kernels.unpermute import unpermute

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
SHAPES = [(7, 3, 5, 50), (1, 1, 2, 1), (13, 6, 67, 2050)]
"""Tokens, K, experts, hidden."""
TERMS = list(itertools.product([False, True], [False, True], ["rows", "dense", None], [False, True]))
"""Which gradients there are: of x', before, of rows (unsummed or summed), after."""


def random(*shape: int, seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like)


def map_of(num_tokens: int, top_k: int, num_experts: int, device: str) -> DispatchMap:
    """With slots that have no row, a token that has none at all, and padding."""
    generator = torch.Generator().manual_seed(num_tokens)
    experts = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    experts.view(-1)[::4][1:] = -1
    experts[3:4] = -1
    return dispatch_map(experts.to(device), num_experts, alignment=4)


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, rows_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], DispatchMap]:
    """x' with its 1/rms, the weight, all gradients, and the map."""
    num_tokens, top_k, num_experts, hidden = shape
    dispatch, like = map_of(num_tokens, top_k, num_experts, device), torch.empty(0, dtype=dtype, device=device)
    found = {
        name: random(num_tokens, hidden, seed=seed, like=like)
        for seed, name in enumerate(("x", "grad_x", "before", "after"))
    }
    found["rows"] = random(len(dispatch.src), hidden, seed=8, like=like).to(rows_dtype or dtype)
    found["weight"] = 1 + random(hidden, seed=9, like=like) / 4
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found["rstd"] = (found["x"].to(wide).square().mean(1) + EPS).rsqrt()
    return found, dispatch


def chosen(
    terms: tuple[bool, bool, str | None, bool], found: dict[str, Tensor], dispatch: DispatchMap, backend: str
) -> dict[str, Any]:
    """Keyword arguments of the op."""
    with_x, with_before, rows, with_after = terms
    arguments: dict[str, Any] = {name: found[name] for name in ("x", "rstd", "weight")}
    arguments |= {
        name: found[name] if there else None
        for name, there in (("grad_x", with_x), ("before", with_before), ("after", with_after))
    }
    summed = unpermute(found["rows"], dispatch, backend=backend).to(found["x"].dtype)
    arguments["rows"] = {"rows": found["rows"], "dense": summed, None: None}[rows]
    return arguments | ({"dispatch": dispatch} if rows == "rows" else {})


def chain(arguments: dict[str, Any], unit_offset: bool, backend: str) -> tuple[Tensor, Tensor]:
    """One op after the other: what autograd runs without the op."""
    rows, dispatch = arguments["rows"], arguments.get("dispatch")
    summed = rows if dispatch is None else unpermute(rows, dispatch, backend=backend).to(arguments["x"].dtype)
    total = None
    for term in (arguments["before"], summed, arguments["after"]):
        if term is not None:
            total = term if total is None else total + term
    assert total is not None
    stream, saved = arguments["grad_x"], (arguments["x"], arguments["rstd"], arguments["weight"])
    alone, both, grad_weight = norm_backward(total, stream, *saved, unit_offset, stream is None, backend)
    return alone if stream is None else both, grad_weight


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.bfloat16, "triton"), *((dtype, "reference") for dtype in (torch.float32, torch.bfloat16, torch.float64))],
    ids=str,
)
def test_the_op_has_the_bits_of_the_chain(
    dtype: torch.dtype, backend: str, terms: tuple[bool, bool, str | None, bool], device: str
) -> None:
    for shape, unit_offset in ((SHAPES[0], False), (SHAPES[1], True)):
        found, dispatch = make(shape, dtype, device)
        arguments = chosen(terms, found, dispatch, backend)
        if terms[1:] == (False, None, False):
            with pytest.raises(ValueError, match=r"no gradient of norm\(x'\) is given"):
                release_router_backward(**arguments, backend=backend)
            continue
        expected = chain(arguments, unit_offset, backend)
        got = release_router_backward(**arguments, unit_offset=unit_offset, backend=backend)
        for value, want in zip(got, expected, strict=True):
            assert value.dtype == want.dtype and torch.equal(value, want)
        again = release_router_backward(**arguments, unit_offset=unit_offset, backend=backend)
        assert torch.equal(again[0], got[0]) and torch.equal(again[1], got[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrower_rows_are_summed_in_their_dtype(backend: str, device: str) -> None:
    """Under autocast the stream is fp32 and rows are bf16."""
    found, dispatch = make(SHAPES[0], torch.float32, device, torch.bfloat16)
    for terms in ((True, True, "rows", True), (False, False, "rows", False)):
        arguments = chosen(terms, found, dispatch, backend)
        got, expected = release_router_backward(**arguments, backend=backend), chain(arguments, False, backend)
        assert got[0].dtype == torch.float32
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        wide = release_router_backward(**(arguments | {"rows": found["rows"].float()}), backend=backend)
        assert not torch.equal(got[0], wide[0]), "the rounding cannot be told"


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_its_twin(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    found, dispatch = make(shape, dtype, device)
    arguments = chosen((True, True, "rows", True), found, dispatch, "reference")
    expected, got = (release_router_backward(**arguments, backend=backend) for backend in BACKENDS)
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]  # row sums in another order
    for value, want in zip(got, expected, strict=True):
        assert relative_error(value, want) < bound
    for value, want in zip(got, chain(arguments, False, "triton"), strict=True):
        assert torch.equal(value, want)


def test_the_order_of_the_sum_is_the_one_written_down(device: str) -> None:
    """bf16 knows no 257: (256 + 1) + 1 is 256, 256 + (1 + 1) is 258, (1 + 1) + 256 is 258. One token of two rows."""
    cols = 16
    dispatch = dispatch_map(torch.tensor([[0, 1]], device=device), 2)
    x, rstd = torch.zeros(1, cols, dtype=torch.bfloat16, device=device), torch.ones(1, device=device)
    weight = torch.ones(cols, dtype=torch.bfloat16, device=device)
    for backend in BACKENDS:
        for before, row, after, expected in ((256, 0.5, 1, 256.0), (1, 0.5, 256, 258.0), (256, 1, 0, 258.0)):
            grad, _ = release_router_backward(
                None,
                torch.full_like(x, before),
                torch.full((2, cols), row, dtype=torch.bfloat16, device=device),  # summed to 2 * row, once rounded
                torch.full_like(x, after),
                x,
                rstd,
                weight,
                dispatch=dispatch,
                backend=backend,
            )  # x is zero: the gradient passes the norm unchanged
            assert grad.unique().tolist() == [expected], (before, row, after)


def test_gradients_are_autograds() -> None:
    """fp64, against a graph of elementary operations only."""
    found, dispatch = make(SHAPES[0], torch.float64, "cpu")
    x, weight = found["x"].clone().requires_grad_(), found["weight"].clone().requires_grad_()
    normed = x / (x.pow(2).mean(1, keepdim=True) + EPS).sqrt() * weight
    picked = found["rows"][dispatch.dst.clamp(min=0).long()] * (dispatch.dst >= 0)[..., None]
    loss = (x * found["grad_x"]).sum() + (normed * (found["before"] + found["after"])).sum()
    loss = loss + (normed[:, None] * picked).sum()
    expected = torch.autograd.grad(loss, (x, weight))
    arguments = chosen((True, True, "rows", True), found, dispatch, "reference")
    torch.testing.assert_close(release_router_backward(**arguments), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_no_tokens(backend: str, device: str) -> None:
    """Strided and expanded gradients; three dimensions; no tokens; rows for nobody; no rows at all."""
    found, dispatch = make(SHAPES[0], torch.float32, device)
    arguments = chosen((True, True, "rows", True), found, dispatch, backend)
    expected = release_router_backward(**arguments, backend=backend)
    strided = {
        name: value.T.contiguous().T if isinstance(value, Tensor) and value.ndim == 2 else value
        for name, value in arguments.items()
    }
    for value, want in zip(release_router_backward(**strided, backend=backend), expected, strict=True):
        assert torch.equal(value, want)
    folded = {
        name: value.view(1, *value.shape) if name in ("x", "grad_x", "before", "after") else value
        for name, value in arguments.items()
    }
    assert torch.equal(release_router_backward(**folded, backend=backend)[0], expected[0][None])
    one = torch.ones((), device=device)
    expanded = {name: one.expand(arguments[name].shape) for name in ("grad_x", "before", "after", "rows")}
    whole = {name: value.contiguous() for name, value in expanded.items()}
    for value, want in zip(
        release_router_backward(**(arguments | expanded), backend=backend),
        release_router_backward(**(arguments | whole), backend=backend),
        strict=True,
    ):
        assert torch.equal(value, want)
    for num_rows in (0, 8):
        hidden = arguments["x"].shape[1]
        empty = {n: v[:0] if n in ("x", "rstd", "grad_x", "before", "after") else v for n, v in arguments.items()}
        nobody = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        for tokens in ({}, empty):
            kept = arguments | tokens
            none = torch.full((len(kept["x"]), 3), -1, dtype=torch.int32, device=device)
            counts = torch.zeros(2, dtype=torch.int32, device=device)
            nowhere = DispatchMap(counts=counts, offsets=counts, padded_offsets=counts, dst=none, src=nobody)
            kept |= {"rows": torch.full((num_rows, hidden), float("nan"), device=device), "dispatch": nowhere}
            grad, grad_weight = release_router_backward(**kept, backend=backend)
            assert grad.shape == kept["x"].shape and grad.isfinite().all() and grad_weight.isfinite().all()
            assert len(grad) or not grad_weight.any()
            without = kept | {"rows": None, "dispatch": None}
            assert torch.equal(grad, release_router_backward(**without, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_one_graph(backend: str, device: str, check_op: Callable[..., None]) -> None:
    found, dispatch = make((7, 3, 5, 16), torch.float32, device)
    saved = (found["x"], found["rstd"], found["weight"], False, backend)
    op = torch.ops.farskip.release_router_backward.default
    check_op(op, found["grad_x"], found["before"], found["rows"], dispatch.dst, found["after"], *saved)
    check_op(op, None, None, found["before"], None, None, *saved)
    arguments = chosen((True, True, "rows", True), found, dispatch, backend)
    compiled = torch.compile(release_router_backward, fullgraph=True, backend="aot_eager")
    for value, want in zip(
        compiled(**arguments, backend=backend), release_router_backward(**arguments, backend=backend), strict=True
    ):
        assert torch.equal(value, want)


def test_bad_input() -> None:
    found, dispatch = make(SHAPES[0], torch.float32, "cpu")
    arguments = chosen((True, True, "rows", True), found, dispatch, "reference")
    for wrong, message in (
        ({"before": found["before"][1:]}, r"before is torch\.float32 \[6, 50\], but x is"),
        ({"after": found["after"].bfloat16()}, r"after is torch\.bfloat16"),
        ({"dispatch": None}, r"rows is torch\.float32 .*, but x is"),
        ({"rows": found["rows"][1:]}, r"rows must be \[\d+, hidden\]"),
        ({"rows": found["rows"].double()}, r"rows torch\.float64 .* of 7 tokens do not fit x"),
        ({"rstd": found["rstd"][1:]}, r"rstd must be \[7\], one per row of x, got \[6\]"),
        ({"weight": found["weight"][1:]}, r"weight must be \[50\]"),
    ):
        with pytest.raises(ValueError, match=message):
            release_router_backward(**(arguments | wrong))
    with pytest.raises(ValueError, match="num_uses 4 must be 2"):
        release_router_by_use(found["x"], None, found["x"], found["weight"], EPS, 4, lambda _: None)


# -- under autograd: one alias per use

Leaves = dict[str, Tensor]
WANTED = {
    "all": ("x", "gate", "rows", "shared"),
    "no stream": ("gate", "rows", "shared"),
    "no rows": ("x", "gate", "shared"),
    "rows": ("rows",),
    "gate": ("gate",),
    "shared": ("x", "shared"),
    "stream": ("x",),
}


def leaves_of(dtype: torch.dtype, device: str, routed: str) -> tuple[Leaves, DispatchMap, DispatchMap | None]:
    """What gets a gradient; the map of the rows that go out; and of those that came in."""
    num_tokens, top_k, num_experts, hidden = SHAPES[0]
    out, like = map_of(*SHAPES[0][:3], device), torch.empty(0, dtype=dtype, device=device)
    leaves = {name: random(num_tokens, hidden, seed=seed, like=like) for seed, name in enumerate(("y", "s", "routed"))}
    leaves["weight"] = 1 + random(hidden, seed=9, like=like) / 4
    if routed == "dense":
        return leaves, out, None
    experts = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(5)).topk(top_k).indices
    came = dispatch_map(experts.to(device), num_experts)
    leaves["routed"] = random(len(came.src), hidden, seed=11, like=like)
    leaves["combine"] = torch.rand(num_tokens, top_k, generator=torch.Generator().manual_seed(6)).to(device)
    return leaves, out, came


def step(
    form: str,
    leaves: Leaves,
    out: DispatchMap,
    came: DispatchMap | None,
    backend: str,
    wanted: tuple[str, ...],
    frozen: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Outputs and gradients. The readers run in another order than their gradients are added in."""
    leaves = {name: leaf.detach().clone().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    stream = (leaves["y"], leaves["s"], leaves["routed"], leaves["weight"], EPS)
    how: dict[str, Any] = {"dispatch": came, "combine_weights": leaves.get("combine"), "backend": backend}
    if form == "chain":
        x, normed = release_router(*stream, **how)
        gate, for_rows, shared = fan_out(normed, 3)
        rows = permute(for_rows, out, backend=backend)
    else:
        gradient = RowsGradient()
        x, gate, for_rows, shared = release_router_by_use(*stream, 3, gradient.take, **how)
        if form == "dense":
            rows = permute(for_rows, out, backend=backend)
        else:
            rows = gradient.copied(lambda tokens: permute(tokens, out, backend=backend), for_rows, out.dst)
    made = {"x": x, "shared": shared.sin(), "gate": gate * 3, "rows": rows.cos()}
    grads = {name: random(*each.shape, seed=20 + len(name), like=each) for name, each in made.items() if name in wanted}
    torch.autograd.backward([made[name] for name in grads], list(grads.values()))
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: each.detach() for name, each in made.items()} | {f"grad of {n}": g for n, g in found.items()}


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("routed", ["rows", "dense"])
@pytest.mark.parametrize(
    ("dtype", "backend", "wanted"),
    [
        *itertools.product(DTYPES[:2], ["reference"], WANTED),
        *itertools.product(DTYPES[:2], ["triton"], ["all", "no stream"]),
    ],
    ids=str,
)
def test_by_use_has_the_bits_of_aliases_and_permute(
    dtype: torch.dtype, backend: str, routed: str, wanted: str, device: str
) -> None:
    """With the rows' gradient unsummed, and with a dense one; backward through all outputs or some."""
    leaves, out, came = leaves_of(dtype, device, routed)
    expected = step("chain", leaves, out, came, backend, WANTED[wanted])
    for form in ("rows", "dense"):
        found = step(form, leaves, out, came, backend, WANTED[wanted])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), f"{form}: {name}"


@pytest.mark.parametrize("frozen", [("weight",), ("y", "s"), ("y", "s", "routed", "combine"), ("combine",)], ids=str)
def test_by_use_with_what_wants_no_gradient(frozen: tuple[str, ...]) -> None:
    leaves, out, came = leaves_of(torch.float32, "cpu", "rows")
    found = [step(form, leaves, out, came, "reference", WANTED["all"], frozen) for form in ("chain", "rows")]
    assert found[0].keys() == found[1].keys() and not any(f"grad of {name}" in found[0] for name in frozen)
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_by_use_without_a_gradient_to_come() -> None:
    leaves, out, came = leaves_of(torch.float32, "cpu", "rows")
    gradient = RowsGradient()
    stream = (leaves["y"], leaves["s"], leaves["routed"], leaves["weight"], EPS)
    made = release_router_by_use(
        *stream, 2, gradient.take, dispatch=came, combine_weights=leaves["combine"].requires_grad_()
    )
    assert len(made) == 3 and made[1].requires_grad
    with torch.no_grad():
        x, gate, for_rows = release_router_by_use(*stream, 2, gradient.take, dispatch=came)
        rows = gradient.copied(lambda tokens: permute(tokens, out), for_rows, out.dst)
    assert not (x.requires_grad or gate.requires_grad or rows.requires_grad)
    assert torch.equal(gate, for_rows)


def test_a_backward_can_be_repeated_and_has_none_of_its_own() -> None:
    leaves, out, _ = leaves_of(torch.float32, "cpu", "dense")
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    gradient = RowsGradient()
    x, gate, for_rows = release_router_by_use(
        leaves["y"], leaves["s"], leaves["routed"], leaves["weight"], EPS, 2, gradient.take
    )
    rows = gradient.copied(lambda tokens: permute(tokens, out), for_rows, out.dst)
    loss = x.sin().sum() + gate.cos().sum() + rows.sin().sum()
    first, second = (torch.autograd.grad(loss, leaves["y"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (of_y,) = torch.autograd.grad(loss, leaves["y"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_y.sum().backward()


def test_another_reader_of_the_alias_for_rows_is_refused() -> None:
    """Its gradient would be lost."""
    leaves, out, _ = leaves_of(torch.float32, "cpu", "dense")
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    gradient = RowsGradient()
    _, _, for_rows = release_router_by_use(
        leaves["y"], leaves["s"], leaves["routed"], leaves["weight"], EPS, 2, gradient.take
    )
    rows = gradient.copied(lambda tokens: permute(tokens, out), for_rows, out.dst)
    with pytest.raises(RuntimeError, match="has another reader, whose gradient would be lost"):
        (rows.sum() + for_rows.sum()).backward()
