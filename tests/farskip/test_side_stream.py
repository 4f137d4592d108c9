"""The side lane at run time: the bits of serial, and by a book of lanes nothing that two streams could race for."""

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from farskip.executor import Executor
from farskip.lanes import SideStream
from farskip.parallel.collectives import Work
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.testing_links import FakeLink, at_wait
from farskip.pending import Pending
from farskip.recorder import Recorder
from farskip.schedule import Do, Placement, Segment, Window, build_schedule, even_segments
from farskip.side_stream import CudaSideLane, make_side_lane, tensors_in
from farskip.stage_graph import COMBINE, DISPATCH
from farskip.testing import assert_equal_bits, load_beside
from farskip.testing_lanes import MAIN, SIDE, LaneBook
from farskip.wait_meter import WaitMeter
from farskip.wiring import MOE_SHARED, Wiring

toys = load_beside(__file__, "toy_layers")
WithoutLanes = load_beside(__file__, "test_executor").Run
WIRINGS, MIX, WIDTH = toys.WIRINGS, toys.MIX, toys.WIDTH
ASIDE = ("merge", "merge_and_route")
FARSKIP = Wiring.named("farskip", 4)
PLACEMENTS = [
    Placement(),
    Placement(attention_core=Window(COMBINE, -1)),
    Placement(attention_in=Window(DISPATCH), shared=Window(DISPATCH)),
]
"""The default; all of attention while the combine before it is under way; none of it."""


class BookedLink(FakeLink):
    """The slowest fake link; what it does to rows happens in no lane."""

    def __init__(self, book: LaneBook) -> None:
        super().__init__(at_wait)
        self.book = book
        self.was_kept: list[Callable[[], bool]] = []

    def all_to_all(self, output: Any, tensor: Any, output_splits: Sequence[int], input_splits: Sequence[int]) -> Work:
        with self.book.on_the_wire():
            return _Booked(super().all_to_all(output, tensor, output_splits, input_splits), self, weakref.ref(tensor))

    def exchange_counts(self, counts: torch.Tensor) -> Pending:
        received, rows = torch.empty_like(counts), (counts.shape[0],)
        return Pending(received, self.all_to_all(received, counts, rows, rows), keep=(counts,))


class _Booked:
    def __init__(self, work: Work, link: BookedLink, sent: Any) -> None:
        self.work, self.link, self.sent = work, link, sent

    def wait(self) -> object:
        tensor = self.sent()
        if tensor is not None:
            self.link.was_kept.append(self.link.book.sent(tensor))
        with self.link.book.on_the_wire():
            return self.work.wait()


class Run:
    """One forward and backward pass in which a book stands for the device. `side_stream`: none is one lane."""

    def __init__(
        self,
        wiring: Wiring,
        side_stream: str,
        *,
        mode: str = "overlapped",
        placement: Placement | None = None,
        length: int = 4,
        recompute: bool = False,
        chunks: int = 1,
        capacity: int | None = None,
        kernels: bool = False,
        mix: Any = MIX,
    ) -> None:
        layers = [toys.ToyBlocks(blocks, seed) for seed, blocks in enumerate(mix)]
        self.book, self.recorder = LaneBook(), Recorder()
        self.link = BookedLink(self.book)
        dispatcher = AllToAllDispatcher(self.link, toys.EXPERTS, chunks, capacity=capacity)
        executor = Executor(layers, wiring, dispatcher=dispatcher, mode=mode, side_stream=side_stream)
        executor.make_side_lane = lambda device, meter: self.book
        executor.stream_kernels = toys.ToyKernels(layers) if kernels else None
        executor.observers.append(self.recorder)
        cut = even_segments(len(mix), length)
        if placement is not None:
            kind = SideStream(side_stream)
            executor.set_schedule(
                build_schedule(executor.graph, mode, segments=cut, placement=placement, side_stream=kind)
            )
        self.schedule = executor.schedule(cut)
        x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(9), requires_grad=True)
        with self.book:
            stream, partial = x * 1.0, x * 1.0
            for segment in self.schedule.segments:
                stream, partial = executor.run_segment(
                    self.schedule, segment, stream, partial, [{}] * len(mix), recompute=recompute
                )
            loss = (stream * torch.arange(WIDTH)).sum()
        self.book.backward(loss)
        assert x.grad is not None
        self.tensors = {"output": stream.detach(), "x": x.grad}
        for index, layer in enumerate(layers):
            self.tensors |= {
                f"{name}.{index}": parameter.grad
                for name, parameter in layer.parameters.items()
                if parameter.grad is not None
            }

    def check(self, other: Any) -> None:
        assert not self.book.races, "\n".join(dict.fromkeys(self.book.races))
        assert all(tensor.isfinite().all() for tensor in self.tensors.values()), "something was read too early"
        assert_equal_bits(self.tensors, other.tensors)
        assert self.link.was_kept and all(each() for each in self.link.was_kept), "what was sent was not kept"
        assert not self.link.in_flight and not self.link.lost


@pytest.mark.parametrize("side_stream", ASIDE)
@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_every_placement_gives_the_bits_of_serial_without_a_race(
    wiring: Wiring, kernels: bool, side_stream: str
) -> None:
    serial = WithoutLanes(wiring, "serial", kernels=kernels)
    for placement in PLACEMENTS:
        aside = Run(wiring, side_stream, placement=placement, kernels=kernels)
        aside.check(serial)
        aside.recorder.check(aside.schedule)
        assert aside.book.crossings, "nothing crossed: there was one lane"


@pytest.mark.parametrize("side_stream", ASIDE)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("wiring", WIRINGS[: len(toys.NAMES)], ids=str)
def test_chunks_segments_and_recomputation_give_the_bits_of_overlapped_without_a_race(
    wiring: Wiring, recompute: bool, side_stream: str
) -> None:
    for chunks, length in ((1, 2), (2, 4)) if recompute else ((2, 2),):
        settings: dict[str, Any] = {"chunks": chunks, "recompute": recompute}
        plain = WithoutLanes(wiring, "overlapped", segments=even_segments(4, length), **settings)
        Run(wiring, side_stream, length=length, **settings).check(plain)


@pytest.mark.parametrize("side_stream", ASIDE)
def test_a_fixed_capacity_too(side_stream: str) -> None:
    plain = Run(FARSKIP, "none", capacity=2)
    assert not plain.book.crossings
    Run(FARSKIP, side_stream, capacity=2).check(plain)


@pytest.mark.parametrize("side_stream", ASIDE)
def test_without_a_device_of_streams_the_lane_runs_in_place(side_stream: str) -> None:
    plain = WithoutLanes(FARSKIP, "overlapped")
    layers = [toys.ToyBlocks(blocks, seed) for seed, blocks in enumerate(MIX)]
    dispatcher = AllToAllDispatcher(FakeLink(at_wait), toys.EXPERTS)
    executor = Executor(layers, FARSKIP, dispatcher=dispatcher, side_stream=side_stream)
    assert any(step.side for step in executor.schedule().forward)
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(9), requires_grad=True)
    stream, _ = executor.run_segment(executor.schedule(), Segment(0, 4), x * 1.0, x * 1.0, [{}] * 4)
    (stream * torch.arange(WIDTH)).sum().backward()
    assert make_side_lane(torch.device("cpu")) is None
    assert x.grad is not None
    assert_equal_bits({"output": stream.detach(), "x": x.grad}, {name: plain.tensors[name] for name in ("output", "x")})


def test_measuring_stages_leaves_the_side_lane_and_comes_back() -> None:
    """The warm-up runs the serial schedule; the one chosen afterwards has the side lane again."""
    layers = [toys.ToyBlocks(MOE_SHARED, seed) for seed in range(4)]
    dispatcher = AllToAllDispatcher(FakeLink(), toys.EXPERTS)
    executor = Executor(layers, FARSKIP, dispatcher=dispatcher, side_stream="merge")
    executor.reschedule("serial", None)
    assert not any(step.side for step in executor.schedule().forward)
    executor.reschedule("overlapped", None)
    assert {step.key.stage for step in executor.schedule().forward if step.side and step.do is Do.RUN} == {"merge"}


def test_the_tensors_of_plans_are_found() -> None:
    a, b, c = (torch.zeros(size) for size in (1, 2, 3))
    link = FakeLink()
    routing = toys.ToyBlocks(MOE_SHARED, 0).route(torch.randn(2, 3, WIDTH))
    found = tensors_in(([a, (b,)], routing, "name", link, None, {"c": c}))
    assert [id(tensor) for tensor in found] == [
        id(tensor) for tensor in (a, b, routing.logits_TE, routing.weights_TK, routing.experts_TK)
    ]
    (_, plan) = AllToAllDispatcher(link, toys.EXPERTS).prepare(torch.randn(2, 3, WIDTH), routing)[0]
    assert {id(plan.expert_R), id(plan.dispatch.dst), id(plan.dispatch.src)} <= set(map(id, tensors_in([plan])))


# -- the book itself can catch something


def test_the_book_sees_what_is_read_before_its_lane_is_behind_it() -> None:
    book = LaneBook()
    with book:
        made = torch.ones(3) * 2
        mark = book.mark()
        with book.entered():
            made + 1
        assert [race.split(" in the ")[1] for race in book.races] == [
            "side lane is not behind what the main lane wrote",
            "side lane uses memory of the main lane that was not kept for it",
        ]
        book.races.clear()
        with book.entered():
            book.read(mark, made)
            made + 1
        assert not book.races
        made += 1
        assert [race.split(" in the ")[1] for race in book.races] == [
            "main lane writes what the side lane may still read"
        ]


def test_the_book_is_behind_the_mark_and_not_behind_what_came_after_it() -> None:
    book = LaneBook()
    with book:
        mark = book.mark()
        late = torch.ones(3) * 2
        with book.entered():
            book.read(mark, late)
            late + 1
    assert [race.split(" in the ")[1] for race in book.races] == ["side lane is not behind what the main lane wrote"]


def test_the_book_runs_backward_in_the_lanes_of_forward() -> None:
    book, seen = LaneBook(), []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor, name: str) -> torch.Tensor:
            ctx.name = name
            return tensor * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            seen.append((ctx.name, book._lane))
            return gradient * 2, None

    x = torch.ones(3, requires_grad=True)
    with book:
        y = Noted.apply(x, "first")
        mark = book.mark()
        with book.entered():
            book.read(mark, y)
            z = Noted.apply(y, "second")
            mark = book.mark()
        book.read(mark, z)
        loss = Noted.apply(z, "third").sum()
    book.backward(loss)
    assert seen == [("third", MAIN), ("second", SIDE), ("first", MAIN)]
    assert not book.races


# -- what it asks of CUDA, with names in the place of streams


class NamedStream:
    """A stream that notes what it is told to wait for; its events know where they were recorded."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def record_event(self) -> "NamedStream":
        return self

    def wait_event(self, event: "NamedStream") -> None:
        self.calls.append(f"{self.name} waits for {event.name}")

    wait_stream = wait_event


@contextmanager
def named_streams() -> Iterator[tuple[list[str], list[NamedStream]]]:
    """What was called, and the current stream as the last of a list; the one that a lane makes is called side."""
    calls: list[str] = []
    current = [NamedStream("main", calls)]

    @contextmanager
    def on(stream: NamedStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.record = lambda: calls.append("event")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device, priority: NamedStream(f"side{priority}", calls))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
        patch.setattr(torch.cuda, "stream", on)
        yield calls, current


class Marked:
    """As much of a tensor as is kept."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def record_stream(self, stream: NamedStream) -> None:
        self.calls.append(f"kept for {stream.name}")


def test_a_read_waits_for_the_other_stream_and_keeps_what_it_reads() -> None:
    with named_streams() as (calls, _):
        lane, tensor = CudaSideLane(torch.device("cuda")), cast(Any, Marked(calls))
        mark = lane.mark()
        lane.read(mark, tensor)
        assert calls == [], "its own lane is in order"
        with lane.entered():
            lane.read(mark, tensor)
            assert calls == ["side-1 waits for main", "kept for side-1"]
            calls.clear()
            mark = lane.mark()
            lane.keep(tensor)
        lane.read(mark, tensor)
        assert calls == ["kept for side-1", "main waits for side-1", "kept for main"]


def test_a_recomputation_goes_home_and_whoever_asked_for_it_waits() -> None:
    with named_streams() as (calls, current):
        lane = CudaSideLane(torch.device("cuda"))
        home = lane.mark()
        with lane.at(home):
            pass
        assert calls == []
        with lane.entered():
            with lane.at(home):
                assert current[-1].name == "main"
            assert calls == ["side-1 waits for main"]


def test_the_meter_counts_what_compute_waits_for_and_not_what_the_side_lane_waits_for() -> None:
    with named_streams() as (calls, _):
        meter, device = WaitMeter(), torch.device("cuda")
        lane = CudaSideLane(device, meter)
        mark = lane.mark()
        with lane.entered():
            lane.read(mark)
            meter.timed(lambda: calls.append("an exchange"), device)
            mark = lane.mark()
        lane.read(mark)
        assert calls == ["side-1 waits for main", "an exchange", "event", "main waits for side-1", "event"]


# -- on a GPU: real streams, either of them late


LONG, SHORT = 200_000_000, 2_000_000
"""Clock cycles: about a tenth of a second, and a millisecond."""


@pytest.fixture
def loaded_kernels() -> None:
    """A kernel's first launch loads it, which may wait for the whole device and hide a race."""
    torch.cuda._sleep(1)
    tensor = torch.ones(8, device="cuda") * 2
    tensor += 1
    torch.empty(8, device="cuda").fill_(7.0)
    assert not torch.equal(tensor, torch.full_like(tensor, 0.0))
    torch.cuda.synchronize()


def cuda_run(wiring: Wiring, side_stream: str, *, slow: str = "", recompute: bool = False, chunks: int = 1) -> Any:
    """As `Run`, on the device over a paced link. `slow`: the lane of which every stage begins with a sleep."""
    from farskip.parallel.paced_copy_link import PacedCopyLink

    device = torch.device("cuda")
    layers = [toys.ToyBlocks(MOE_SHARED, seed) for seed in range(4)]
    for layer in layers:
        layer.parameters = {
            name: parameter.detach().to(device).requires_grad_() for name, parameter in layer.parameters.items()
        }
    link = PacedCopyLink(device, bandwidth_gbyte_s=100.0, latency_us=200.0)
    dispatcher = AllToAllDispatcher(link, toys.EXPERTS, chunks, backend="reference")
    mode = "overlapped" if side_stream != "serial" else "serial"
    executor = Executor(
        layers, wiring, dispatcher=dispatcher, mode=mode, side_stream="none" if mode == "serial" else side_stream
    )
    aside = {"merge": ("merge",), "merge_and_route": ("merge", "route")}.get(side_stream, ())

    def observe(instruction: Any, direction: str) -> Any:
        if instruction.do is Do.RUN and slow and (instruction.key.stage in aside) == (slow == SIDE):
            torch.cuda._sleep(SHORT)
        return lambda: None

    executor.observers.append(observe)
    x = torch.randn(4, 32, WIDTH, generator=torch.Generator().manual_seed(9)).to(device).requires_grad_()
    found: dict[str, torch.Tensor] = {}
    for _ in range(3):  # the allocator hands out again what the first pass has freed
        for parameter in (x, *(each for layer in layers for each in layer.parameters.values())):
            parameter.grad = None
        stream, _ = executor.run_segment(
            executor.schedule(), Segment(0, 4), x * 1.0, x * 1.0, [{}] * 4, recompute=recompute
        )
        (stream * torch.arange(WIDTH, device=device)).sum().backward()
        assert x.grad is not None
        found = {"output": stream.detach(), "x": x.grad}
        for index, layer in enumerate(layers):
            found |= {f"{name}.{index}": each.grad for name, each in layer.parameters.items() if each.grad is not None}
    torch.cuda.synchronize()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["", MAIN, SIDE], ids=["even", "slow_compute", "slow_side"])
@pytest.mark.parametrize("side_stream", ASIDE)
@pytest.mark.parametrize("name", ["ordinary", "farskip", "attn_only", "ladder"])
def test_on_a_gpu_a_side_stream_gives_the_bits_of_serial(name: str, side_stream: str, slow: str) -> None:
    wiring = Wiring.named(name, 4)
    for chunks, recompute in itertools.product((1, 2), (False, True)):
        expected = cuda_run(wiring, "serial", chunks=chunks, recompute=recompute)
        actual = cuda_run(wiring, side_stream, slow=slow, chunks=chunks, recompute=recompute)
        assert_equal_bits(actual, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("loaded_kernels")
def test_on_a_gpu_the_side_lane_runs_beside_compute_and_a_read_waits() -> None:
    device = torch.device("cuda")
    meter = WaitMeter()
    lane = CudaSideLane(device, meter)
    made = torch.ones(1 << 20, device=device)
    mark = lane.mark()
    torch.cuda._sleep(LONG)  # what compute was given after the mark
    with lane.entered():
        lane.read(mark, made)
        aside = made * 2
        done = lane.mark()
    done.event.synchronize()
    assert not torch.cuda.current_stream().query(), "the side lane has waited for what came after the mark"
    with lane.entered():
        torch.cuda._sleep(2 * LONG)
        aside += 1
        done = lane.mark()
    lane.read(done, aside)
    assert torch.equal(aside, torch.full_like(aside, 3.0))
    assert meter.seconds() > 0.01, "compute stood still for the side lane, and nobody counted it"


@pytest.mark.gpu
@pytest.mark.usefixtures("loaded_kernels")
def test_on_a_gpu_memory_that_the_side_lane_reads_is_not_handed_out_early() -> None:
    device = torch.device("cuda")
    lane = CudaSideLane(device)
    torch.cuda.synchronize()
    made = torch.ones(1 << 22, device=device)
    mark = lane.mark()
    with lane.entered():
        lane.read(mark, made)
        torch.cuda._sleep(LONG)
        aside = made * 2
    del made
    for _ in range(4):
        torch.empty(1 << 22, device=device).fill_(7.0)
    torch.cuda.synchronize()
    assert torch.equal(aside, torch.full_like(aside, 2.0))


@pytest.mark.gpu
@pytest.mark.usefixtures("loaded_kernels")
def test_on_a_gpu_a_lane_is_left_for_that_of_a_mark_and_waited_for() -> None:
    lane = CudaSideLane(torch.device("cuda"))
    home = lane.mark()
    with lane.entered():
        with lane.at(home):
            assert torch.cuda.current_stream() == home.stream
            torch.cuda._sleep(LONG)
            made = torch.ones(1 << 20, device="cuda")
        made += 1
        side = torch.cuda.current_stream()
    assert side != home.stream
    side.synchronize()
    assert home.stream.query(), "the side lane went on before what was issued at home"
