"""Launch and wait, fan-out and marks: gradients, order, and what nobody may read."""

import itertools

import pytest
import torch

from farskip.async_autograd import InFlight, fan_out, mark_backward
from farskip.pending import Pending


class Gather:
    """A collective that picks rows, into a buffer that is NaN until it is waited for. Shapes differ in and out."""

    def __init__(self, rows: list[int], num_rows: int, log: list[str] | None = None, name: str = "gather") -> None:
        self.matrix = torch.zeros(len(rows), num_rows, dtype=torch.float64)
        self.matrix[torch.arange(len(rows)), rows] = 1.0
        self.log = log if log is not None else []
        self.name = name

    def launch(self, tensor: torch.Tensor) -> Pending:
        assert tensor.is_contiguous(), "sent as it lies in memory"
        output = torch.full((self.matrix.shape[0], *tensor.shape[1:]), float("nan"), dtype=tensor.dtype)
        collective = self

        class Work:
            def wait(self) -> None:
                output.copy_(collective.matrix @ tensor)

        return Pending(output, Work(), keep=(tensor,))

    def reverse(self) -> "Gather":
        reversed_ = Gather([], 0, self.log, self.name)
        reversed_.matrix = self.matrix.T.contiguous()
        return reversed_


def logged(gather: Gather) -> InFlight:
    def notify(do: str, backward: bool):  # type: ignore[no-untyped-def]
        gather.log.append(f"{do} {gather.name}{' backward' if backward else ''}")
        return lambda: gather.log.append(f"end of {do}")

    return InFlight(gather, notify)


@pytest.mark.parametrize("rows", [[2, 0, 1], [0, 0, 2, 1, 1], [1], []], ids=str)
def test_gradients_are_those_of_the_blocking_exchange(rows: list[int]) -> None:
    """Uneven shapes: what comes out has more, fewer or no rows."""
    gather = Gather(rows, 3)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(rows), 4, dtype=torch.float64)
    in_flight = InFlight(gather)
    result = in_flight.wait(in_flight.launch(x * 2))
    (result * weight).sum().backward()
    assert torch.equal(result, gather.matrix @ (x * 2))
    assert x.grad is not None and torch.equal(x.grad, 2 * (gather.matrix.T @ weight))


def test_backward_launches_where_forward_waited() -> None:
    """The mirror, from creation order alone."""
    log: list[str] = []
    first, second = logged(Gather([1, 0, 2], 3, log, "first")), logged(Gather([2, 1, 0], 3, log, "second"))
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def stage(name: str, tensor: torch.Tensor) -> torch.Tensor:
        log.append(f"run {name}")
        (tensor,) = mark_backward(lambda: log.append(f"run {name} backward"), tensor.sin())
        return tensor

    flying = first.launch(stage("a", x))
    cover = stage("b", x)
    flying = second.launch(stage("c", first.wait(flying)))
    more_cover = stage("d", cover)
    result = second.wait(flying)
    log[:] = [entry for entry in log if not entry.startswith("end")]
    forward, log[:] = list(log), []
    (result + more_cover).sum().backward()
    backward = [entry for entry in log if not entry.startswith("end")]
    exchanged = {"launch": "wait", "wait": "launch", "run": "run"}
    mirrored = [f"{exchanged[entry.split()[0]]} {entry.split()[1]} backward" for entry in reversed(forward)]
    assert backward == mirrored


def test_what_lies_between_launch_and_wait_is_undefined_and_never_read() -> None:
    """The buffer is NaN until waited for; in backward the placeholder is a NaN that must not reach a gradient."""
    in_flight = InFlight(Gather([1, 0], 2))
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    unfilled = in_flight.launch(x)
    assert unfilled.isnan().all()
    seen = []
    unfilled.register_hook(lambda gradient: seen.append(gradient.clone()))
    in_flight.wait(unfilled).sum().backward()
    assert len(seen) == 1 and seen[0].isnan().all() and seen[0].shape == unfilled.shape
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_a_strided_gradient_is_made_contiguous_before_it_is_sent() -> None:
    in_flight = InFlight(Gather([1, 0], 2))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    result = in_flight.wait(in_flight.launch(x.T.contiguous().T))
    (result.T @ torch.ones(2, 1, dtype=torch.float64)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_without_gradients_no_graph_is_built() -> None:
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    in_flight = InFlight(Gather([1, 0], 2))
    with torch.no_grad():
        result = in_flight.wait(in_flight.launch(x))
    assert not result.requires_grad and torch.equal(result, x[[1, 0]])
    in_flight = InFlight(Gather([1, 0], 2))
    assert not in_flight.wait(in_flight.launch(x.detach())).requires_grad


def test_launch_twice_and_wait_without_launch_are_errors() -> None:
    x = torch.randn(2, 2, dtype=torch.float64)
    in_flight = InFlight(Gather([1, 0], 2))
    with pytest.raises(AssertionError, match="waited for before it was launched"):
        in_flight.wait(x)
    in_flight.launch(x)
    with pytest.raises(AssertionError, match="launched twice"):
        in_flight.launch(x)


def test_a_second_derivative_is_refused_and_not_silently_wrong() -> None:
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    in_flight = InFlight(Gather([1, 0], 2))
    result = in_flight.wait(in_flight.launch(x * x))
    (gradient,) = torch.autograd.grad((result * result).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_backward_may_run_twice_over_a_kept_graph() -> None:
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    in_flight = InFlight(Gather([1, 0], 2))
    loss = (in_flight.wait(in_flight.launch(x)) ** 2).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()  # type: ignore[union-attr]
    loss.backward()
    assert x.grad is not None and torch.equal(x.grad, 2 * first)


# -- fan-out --------------------------------------------------------------------------------------------------------

# Three gradients whose float32 sum depends on the order: (1 + 1e8) - 1e8 = 0, 1 + (1e8 - 1e8) = 1.
PARTS = (1.0, 1e8, -1e8)


@pytest.mark.parametrize("creation", list(itertools.permutations(range(3))), ids=str)
def test_fan_out_adds_gradients_in_the_order_of_the_aliases(creation: tuple[int, ...]) -> None:
    """Whatever order the uses are created in, and so whatever order they run backwards in."""
    x = torch.zeros(1, requires_grad=True)
    aliases = fan_out(x * 1.0, 3)
    used = {index: aliases[index] * PARTS[index] for index in creation}
    total = sum((used[index] for index in creation), torch.zeros(1))
    total.sum().backward()
    expected = (torch.tensor([PARTS[0]]) + PARTS[1]) + PARTS[2]
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_without_fan_out_the_order_of_creation_decides() -> None:
    """The reason why fan-out exists; were this not so, it could go."""
    found = set()
    for creation in itertools.permutations(range(3)):
        x = torch.zeros(1, requires_grad=True)
        middle = x * 1.0
        used = [middle * PARTS[index] for index in creation]
        (used[0] + used[1] + used[2]).sum().backward()
        found.add(float(x.grad))  # type: ignore[arg-type]
    assert len(found) > 1


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_an_alias_without_a_use_adds_nothing(unused: int) -> None:
    x = torch.ones(2, requires_grad=True)
    aliases = fan_out(x * 1.0, 3)
    sum(aliases[index] * (index + 1) for index in range(3) if index != unused).sum().backward()  # type: ignore[union-attr]
    assert x.grad is not None and torch.equal(x.grad, torch.full((2,), 6.0 - (unused + 1)))


def test_fan_out_of_nothing_used_gives_no_gradient() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    fan_out(x * 1.0, 3)
    y.sum().backward()
    assert x.grad is None


def test_fan_out_is_free_where_nothing_needs_a_gradient() -> None:
    x = torch.ones(2)
    assert all(alias is x for alias in fan_out(x, 3))
    y = torch.ones(2, requires_grad=True)
    assert fan_out(y, 1)[0] is y
    with torch.no_grad():
        assert all(alias is y for alias in fan_out(y, 3))


# -- marks ------------------------------------------------------------------------------------------------------------


def test_a_mark_is_passed_once_and_changes_no_bit() -> None:
    x = torch.randn(5, requires_grad=True)
    calls: list[str] = []
    a, b = mark_backward(lambda: calls.append("mark"), x.sin(), x.cos())
    (a * b).sum().backward()
    marked, x.grad = x.grad, None
    (x.sin() * x.cos()).sum().backward()
    assert calls == ["mark"] and marked is not None and x.grad is not None and torch.equal(marked, x.grad)


def test_a_mark_on_constants_does_nothing() -> None:
    x = torch.randn(5)
    assert mark_backward(lambda: pytest.fail("called"), x)[0] is x
