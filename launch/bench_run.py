"""One rank's part of `farskip bench overlap`: build, tune, check and time the variants. All methods are collectives."""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from farskip.benchmarking import Computed, CoreAccount, Repeat, difference, interleave
from farskip.launch.bench_config import BenchOverlapConfig, Compute, Parallelism
from farskip.launch.bench_tensor import RealTensorModels, TimedTensorModels, tensor_kinds
from farskip.launch.bench_variants import Kind, RealModels, TimedModels, Variant, kinds
from farskip.launch.ranks import Ranks
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.duplex_link import real_link
from farskip.parallel.emulated_link import EmulatedLink
from farskip.parallel.gloo_threads import GlooThreads, set_gloo_threads
from farskip.parallel.local_copy import LocalCopyLink
from farskip.parallel.mesh import EP_AXIS, TP_AXIS, axis_group, build_mesh
from farskip.parallel.together import barrier
from farskip.simulator import StageTimes, explain, simulate
from farskip.stage_timer import StageTimer

DECODE = "decode"
_TUNING_STEPS = 2
_SHOWN_LAYERS = range(1, 3)


class Bench:
    """All variants of one run.

    Args:
        config: of the benchmark.
        ranks: this rank among the hosts.
        say: called with lines for the terminal.
    """

    def __init__(self, config: BenchOverlapConfig, ranks: Ranks, *, say: Callable[[str], None]) -> None:
        self._config = config
        self._ranks = ranks
        self._say = say
        self._cores = CoreAccount()
        self._is_tensor = config.parallel is Parallelism.tensor
        self._mesh = build_mesh(1, tp=config.hosts) if self._is_tensor else build_mesh(config.hosts)
        group = axis_group(self._mesh, TP_AXIS if self._is_tensor else EP_AXIS)
        self._link: ProcessGroupLink = (
            EmulatedLink(
                group,
                bandwidth_gbit_s=config.emulated.bandwidth_gbit_s,
                latency_us=config.emulated.latency_us,
            )
            if config.link == "emulated"
            else real_link(group)
        )
        self._no_link = LocalCopyLink(group)
        self._models = self._build_models()
        self.variants: dict[str, Variant] = {}
        self.not_reported: dict[str, str] = {}
        size = config.size
        generator = torch.Generator().manual_seed(1000 + (0 if self._is_tensor else ranks.rank))
        self._gradient_BSD = torch.randn(size.batch, size.sequence, size.hidden, generator=generator)

    def close(self) -> None:
        """End the helper thread of an emulated link."""
        if isinstance(self._link, EmulatedLink):
            self._link.close()

    def _build_models(self) -> "RealModels | TimedModels | RealTensorModels | TimedTensorModels":
        config, is_timed = self._config, self._config.compute is Compute.timed
        if self._is_tensor:
            return TimedTensorModels(config) if is_timed else RealTensorModels(config, self._mesh)
        return TimedModels(config, self._ranks.rank) if is_timed else RealModels(config, self._mesh, self._ranks.rank)

    def run(self, passes: Sequence[str]) -> dict[str, Any]:
        """Everything in order, `passes` and decode where there is one. What rank 0 writes down: repeats, what windows
        allow, stage times, what is missing."""
        if self._is_tensor and self._config.compute is Compute.real:
            passes = [*passes, DECODE]
        self._build()
        realtime = set_gloo_threads(self._config.gloo_threads)  # all process groups are there
        times = self._tune()
        self._check()
        times = {name: of_one for name, of_one in times.items() if name in self.variants}
        self._say(f"timing {len(self.variants)} variants, {self._config.repeats} clean repeats of each")
        repeats = self._time(passes)
        return {
            "passes": {
                name: {variant: [asdict(repeat) for repeat in of_one] for variant, of_one in of_pass.items()}
                for name, of_pass in repeats.items()
            },
            "allowed": {name: self._allowed(name, times) for name in passes},
            "stage_ms": {
                name: {"forward": dict(of_one.forward), "backward": dict(of_one.backward)}
                for name, of_one in times.items()
            },
            "timelines": {name: self._timeline(name, times[name]) for name in times if name != self._config.blocking},
            "not_reported": self.not_reported,
            "run_queue_is_known": self._cores.is_known,
            "gloo_threads": str(GlooThreads.realtime if realtime else GlooThreads.ordinary),
        }

    def _build(self) -> None:
        for kind in tensor_kinds() if self._is_tensor else kinds(self._config):
            self.variants[kind.name] = self._models.build(kind, self._link)
        free = Kind(name=self._config.free, wiring="ordinary", schedule="serial")
        self.variants[free.name] = self._models.build(free, self._no_link)
        if not self._is_tensor:
            self._add_megatron()

    def _add_megatron(self) -> None:
        """The variants of the file that `config.megatron` names, or why there are none."""
        path = Path(self._config.megatron)
        if not self._config.megatron:
            return
        why = ""
        if self._config.compute is not Compute.real:
            why = "compute is timed"
        elif not path.is_file():
            why = f"there is no file {path} here"
        elif importlib.util.find_spec("megatron") is None:
            why = "megatron-core is not installed"
        if why:
            self._say(f"megatron_blocking, megatron_shared: left out, {why}")
            return
        spec = importlib.util.spec_from_file_location("farskip_megatron_variants", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for variant in module.build(self._config, self._models, self._mesh):
            self.variants[variant.name] = variant

    def _tune(self) -> dict[str, StageTimes]:
        """Stage times of every variant with a schedule of its own, by which its schedule is chosen."""
        found = {}
        for name, variant in self.variants.items():
            executor = variant.executor
            if executor is None or (executor.mode == "serial" and name != self._config.blocking):
                continue
            mode, timer = executor.mode, StageTimer(self._ranks.device)
            executor.reschedule("serial", None)
            variant.computed(self._gradient_BSD)
            executor.observers.append(timer)
            for _ in range(_TUNING_STEPS):
                variant.computed(self._gradient_BSD)
            executor.observers.remove(timer)
            found[name] = self._agree(timer.times())
            executor.reschedule(mode, found[name])
        self.variants[self._config.free].computed(self._gradient_BSD)
        if not self._is_tensor:
            self._no_link.freeze()
        return found

    def _check(self) -> None:
        """Leave only variants that compute what they should.

        Raises:
            RuntimeError: the variant that all others are compared with is wrong itself.
        """
        computed = {
            name: variant.computed(self._gradient_BSD)
            for name, variant in self.variants.items()
            if name != self._config.free
        }
        for name in list(computed):
            variant = self.variants[name]
            if variant.reference:
                reference = computed.get(variant.reference)
                what = difference(computed[name], reference, exact=variant.exact) if reference else "it is wrong itself"
            else:
                whole = Computed(output=self._models.whole(variant.wiring))
                what = difference(computed[name], whole, exact=False)
            reasons = [reason for reason in self._gather(what) if reason]
            if reasons:
                self.not_reported[name] = f"{reasons[0]} from {variant.reference or 'the model on one rank'}"
                del self.variants[name], computed[name]
        blocking = self._config.blocking
        if blocking in self.not_reported:
            raise RuntimeError(f"{blocking}: {self.not_reported[blocking]}; no figure would mean anything")
        for name, why in self.not_reported.items():
            self._say(f"{name}: not reported: {why}")

    def _time(self, passes: Sequence[str]) -> dict[str, dict[str, list[Repeat]]]:
        config = self._config
        names = [f"{variant}/{name}" for variant in self.variants for name in passes]
        for name in names:
            self._timed(name)  # the first one after the check allocates; it is not counted

        def after_round(number: int, repeats: Mapping[str, Sequence[Repeat]]) -> None:
            clean = min(sum(repeat.is_clean for repeat in of_one) for of_one in repeats.values())
            self._say(f"round {number}: {clean} of {config.repeats} clean repeats of every variant")

        found = interleave(
            names,
            self._timed,
            clean_repeats=config.repeats,
            max_rounds=config.rounds or 3 * config.repeats,
            after_round=after_round,
        )
        return {name: {variant: found[f"{variant}/{name}"] for variant in self.variants} for name in passes}

    def _timed(self, name: str) -> Repeat:
        """One step, from a barrier to the end of the slowest rank."""
        variant_name, _, pass_name = name.partition("/")
        variant = self.variants[variant_name]
        gradient_BSD = self._gradient_BSD if pass_name == "forward_backward" else None
        barrier(self._ranks.device)
        exposed, cores, start = self._link.meter.seconds(), self._cores.times(), time.perf_counter()
        if pass_name == DECODE:
            assert variant.decode is not None
            with torch.no_grad():
                variant.decode()
        else:
            variant.run(gradient_BSD)
        ms = 1e3 * (time.perf_counter() - start)
        had = self._cores.times().since(cores)
        exposed_ms = 1e3 * (self._link.meter.seconds() - exposed)
        variant.drop_gradients()
        largest = torch.tensor([ms, had.delay / ms, exposed_ms, had.others_ran, had.others_queued])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        ms, share, exposed_ms, others_ran_ms, others_queued_ms = largest.tolist()
        return Repeat(
            ms=ms,
            delay_share=share,
            is_clean=share <= self._config.delay_limit,
            exposed_ms=exposed_ms if variant.executor is not None else None,
            others_ran_ms=others_ran_ms if self._cores.is_known else None,
            others_queued_ms=others_queued_ms if self._cores.is_known else None,
        )

    def _allowed(self, pass_name: str, times: Mapping[str, StageTimes]) -> dict[str, float]:
        """Per variant: the share of its communication that the windows of its schedule hide, by simulation. Stage times
        are not those of decode, so nothing is said about that."""
        found: dict[str, float] = {}
        for name, of_one in times.items():
            if name == self._config.blocking or pass_name == DECODE:
                continue
            executor = self.variants[name].executor
            assert executor is not None
            schedule = executor.schedule()
            lists = {"forward": schedule.forward, "backward": schedule.backward}
            if pass_name == "forward":
                del lists["backward"]
            timelines = [simulate(steps, of_one, direction) for direction, steps in lists.items()]
            total = sum(timeline.communication_total for timeline in timelines)
            found[name] = 1.0 - sum(timeline.exposed_total for timeline in timelines) / total if total else 0.0
        return found

    def _timeline(self, name: str, times: StageTimes) -> str:
        """What hides under what, in the middle of the model, and the arithmetic of its windows."""
        executor = self.variants[name].executor
        assert executor is not None
        schedule, lines = executor.schedule(), []
        for direction, steps in (("forward", schedule.forward), ("backward", schedule.backward)):
            lines += [f"{name}, {direction}, layers 1 and 2", schedule.timeline(direction, layers=_SHOWN_LAYERS)]
            lines += ["all layers, milliseconds:", explain(steps, times, direction).splitlines()[-1], ""]
        return "\n".join(lines)

    def _agree(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self._config.hosts
        dist.all_gather_object(found, value)
        return found
