"""Settings of `farskip bench overlap`. Every field is documented by the string below it, which ``--help`` prints."""

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum

from farskip.launch.bench_names import BLOCKING, FREE, TENSOR
from farskip.parallel.gloo_threads import GlooThreads
from farskip.wiring import Wiring


class Parallelism(StrEnum):
    """What is spread over the hosts."""

    experts = "experts"
    tensor = "tensor"


class Compute(StrEnum):
    """What stands between the exchanges."""

    real = "real"
    timed = "timed"


class RoutingKind(StrEnum):
    """Where tokens go."""

    balanced = "balanced"
    skewed = "skewed"


@dataclass(kw_only=True)
class SizeConfig:
    """The model, a deepseek_v3 with random weights; with parallel=tensor a llama. Timed compute uses hidden, experts,
    top_k, batch and sequence."""

    layers: int = 8
    """Decoder layers, each with a shared and routed experts."""
    hidden: int = 512
    """Width of the residual stream; a row of an exchange is 4 bytes times this."""
    heads: int = 8
    """Attention heads of width 32; with parallel=tensor of width hidden / heads, and hosts has to divide them."""
    experts: int = 8
    """Routed experts of all hosts together; hosts has to divide it."""
    top_k: int = 2
    """Experts per token."""
    expert_width: int = 64
    """Width of a routed expert."""
    shared_experts: int = 4
    """Width of the shared expert, in units of expert_width."""
    mlp_width: int = 1024
    """parallel=tensor: width of the dense MLP; hosts has to divide it."""
    batch: int = 2
    """Sequences per host; with parallel=tensor all hosts have the same."""
    sequence: int = 320
    """Tokens per sequence."""


@dataclass(kw_only=True)
class TimedConfig:
    """compute=timed: sleeps per layer in forward, in milliseconds; backward sleeps twice as long."""

    attention_ms: float = 17.0
    """Attention, half of it in front of the core."""
    shared_ms: float = 17.0
    """Shared expert."""
    experts_ms: float = 9.0
    """Routed experts, for an even share of the rows."""
    mlp_ms: float = 17.0
    """parallel=tensor: the dense MLP."""


@dataclass(kw_only=True)
class EmulatedConfig:
    """link=emulated: the machine's loopback, held back by a helper thread that sleeps."""

    bandwidth_gbit_s: float = 0.5
    """Gigabits per second out of each rank."""
    latency_us: float = 100.0
    """Microseconds added to each exchange."""


@dataclass(kw_only=True)
class BenchOverlapConfig:
    """farskip bench overlap: what overlap gains over a link that costs time."""

    link: str = "500mbit"
    """A rate from 100mbit to 1gbit: hosts are network namespaces joined by veth pairs with that rate (Linux, root).
    local: ranks over loopback, where there is nothing to gain. emulated: loopback, held back (no root)."""
    hosts: int = 2
    """Hosts with one rank each."""
    parallel: Parallelism = Parallelism.experts
    """experts: the experts of a MoE are spread over the hosts, every one of which has tokens of its own. tensor: the
    sub-blocks of a dense model are cut over the hosts, which see the same tokens; wirings are ordinary, parallel and
    ladder, and with real compute there is a third pass, decode."""
    compute: Compute = Compute.real
    """real: a transformers model on one core per rank. timed: sleeps in its place, which need no cores."""
    routing: RoutingKind = RoutingKind.balanced
    """balanced: every expert gets equally many tokens. skewed: those of the first host 1.5 times their share."""
    wirings: list[str] = field(default_factory=lambda: ["ordinary", "farskip"])
    """parallel=experts: wirings to compare; ordinary is always there, because speed-ups are against it."""
    chunks: int = 2
    """Parts into which the chunked variants cut the tokens of a layer; 1 leaves those variants out."""
    repeats: int = 12
    """Clean repeats wanted of every variant and pass."""
    delay_limit: float = 0.05
    """A repeat is rejected if a rank waited for a core because of other processes longer than this share of the step.
    (How long it stood in the run queue, less what its own threads that move bytes ran.)"""
    rounds: int = 0
    """Rounds (one repeat of every variant) after which to stop even with fewer clean repeats; 0: 3 times repeats."""
    megatron: str = "benchmarks/megatron_moe.py"
    """File of the repository that builds the variants with megatron-core's own MoE layer (compute=real). They are left
    out, with a word about it, where the file or megatron-core is missing, or with an empty value."""
    out: str = ""
    """Result as JSON, and beside it a picture with the same name and the ending png; empty: only the table."""
    threads: int = 1
    """CPU threads per rank."""
    gloo_threads: GlooThreads = GlooThreads.auto
    """When gloo's threads, which move the bytes, get a core. realtime: at once, ahead of compute (needs a right that
    root has); ordinary: in line with it; auto: realtime where this process may. The result says which it was."""
    timeout_s: int = 300
    """Seconds after which a rank that does not answer ends the command."""
    size: SizeConfig = field(default_factory=SizeConfig)
    timed: TimedConfig = field(default_factory=TimedConfig)
    emulated: EmulatedConfig = field(default_factory=EmulatedConfig)

    @property
    def blocking(self) -> str:
        """The variant that speed-ups are against."""
        return TENSOR + BLOCKING if self.parallel is Parallelism.tensor else BLOCKING

    @property
    def free(self) -> str:
        """The variant without communication."""
        return TENSOR + FREE if self.parallel is Parallelism.tensor else FREE

    def check(self) -> None:
        """Refuse what cannot run, before anything is started.

        Raises:
            ValueError: a value out of range.
        """
        for key, least in (
            ("hosts", 2),
            ("chunks", 1),
            ("repeats", 1),
            ("rounds", 0),
            ("threads", 1),
            ("timeout_s", 1),
        ):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} is too small; use at least {least}")
        for size in fields(SizeConfig):
            value = getattr(self.size, size.name)
            if value < 1:
                raise ValueError(f"size.{size.name}={value} is too small; use at least 1")
        for time in fields(TimedConfig):
            value = getattr(self.timed, time.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"timed.{time.name}={value} is no time; use 0 or more milliseconds")
        if not 0 < self.emulated.bandwidth_gbit_s < math.inf:
            raise ValueError(f"emulated.bandwidth_gbit_s={self.emulated.bandwidth_gbit_s} must be above 0")
        if not 0 <= self.emulated.latency_us < math.inf:
            raise ValueError(f"emulated.latency_us={self.emulated.latency_us} must be at least 0")
        if not self.delay_limit > 0:
            raise ValueError(
                f"delay_limit={self.delay_limit} must be above 0; 0.05 rejects little and keeps figures fair"
            )
        cut = ("experts",) if self.parallel is Parallelism.experts else ("heads", "mlp_width")
        for key in cut:
            if getattr(self.size, key) % self.hosts:
                raise ValueError(
                    f"hosts={self.hosts} does not divide size.{key}={getattr(self.size, key)}: choose a divisor of it"
                )
        if self.parallel is Parallelism.tensor and self.size.hidden % (2 * self.size.heads):
            raise ValueError(
                f"size.hidden={self.size.hidden} is no multiple of twice size.heads={self.size.heads}, so heads have "
                "no even width: change one"
            )
        for wiring in self.wirings:
            Wiring.named(wiring, self.size.layers)
        if not 1 <= self.size.top_k <= self.size.experts:
            raise ValueError(f"size.top_k={self.size.top_k} is outside 1..{self.size.experts}, the number of experts")
