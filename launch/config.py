"""Settings of the commands pretrain, distill and demo, as structured configurations for Hydra.

Every field is documented by the string below it; ``--help`` prints these strings, and a test refuses a field without
one. Settings of the text and of the training loop are documented where they are used (`farskip.data_config`,
`farskip.training_config`).
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from farskip.data_config import DataConfig
from farskip.lanes import SideStream
from farskip.parallel.gloo_threads import GlooThreads
from farskip.training_config import CheckpointConfig, HeldoutConfig, OptimizerConfig, TrainingConfig


class LinkKind(StrEnum):
    """What carries the rows between ranks."""

    real = "real"
    emulated = "emulated"


class ScheduleMode(StrEnum):
    """Where collectives are waited for."""

    overlapped = "overlapped"
    serial = "serial"


class Recompute(StrEnum):
    """Which activations are thrown away in forward and computed again in backward."""

    none = "none"
    selective = "selective"
    full = "full"


class Kernels(StrEnum):
    """What routers and routed experts run on."""

    auto = "auto"
    triton = "triton"
    reference = "reference"
    off = "off"


@dataclass(kw_only=True)
class WiringConfig:
    """Which outputs the sub-blocks leave out."""

    name: str = "farskip"
    """ordinary, farskip, attn_only, mlp_only, ladder or parallel."""
    layers: str = "all"
    """Layers that get it, the rest stays ordinary: all, last:3, first:3, 2:5 (half-open), 3 or [0,4,5]."""
    stage_layers: int = 0
    """Rewire in stages while training: so many of these layers, then as many more, from the last layer to the first;
    0: all at once."""
    stage_steps: int = 0
    """Optimizer steps of each stage; the last one lasts to the end."""


@dataclass(kw_only=True)
class LinkConfig:
    """What carries the rows between ranks."""

    kind: LinkKind = LinkKind.real
    """real: the process group itself; emulated: the same, slowed down to the bandwidth and latency below."""
    bandwidth_gbit_s: float = 1.0
    """Emulated link only: gigabits per second out of each rank."""
    latency_us: float = 100.0
    """Emulated link only: microseconds per exchange."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How the ranks share the work. All ranks, or with tp all groups of them, are data-parallel."""

    ep: int = 0
    """Ranks that share the experts of a layer (expert parallelism); 0: all ranks. With tp, 1 or a multiple of it."""
    tp: int = 1
    """Neighboring ranks that share attention, dense MLPs and shared experts (tensor parallelism); they get the same
    tokens."""
    sequence_parallel: bool = False
    """With tp: each of these ranks holds its share of the tokens between sub-blocks, and reduce-scatter and all-gather
    stand in the place of each all-reduce. chunks=2 hides most of them under ladder."""
    schedule: ScheduleMode = ScheduleMode.overlapped
    """overlapped: collectives run under compute; serial: each is waited for at once. Same function, same bits."""
    warmup_steps: int = 2
    """Steps that measure the stages before training, to choose the overlapped schedule by; 0: by relative defaults."""
    side_stream: SideStream = SideStream.none
    """Stages of an overlapped schedule that run on a CUDA stream beside compute: none, merge (the sum of the rows that
    came back) or merge_and_route (and the next router). Same bits. No GPU has measured it yet; on CPU no effect."""
    chunks: int = 1
    """Parts into which each layer's tokens are cut on their way, so that exchanges also hide under routed experts, and
    with sequence_parallel under MLPs and shared experts."""
    recompute: Recompute = Recompute.none
    """none. selective: attention core, MLP and experts keep only their inputs; no exchange is repeated. full: keep only
    the residual streams between segments, and compute and exchange the rest again in backward."""
    recompute_layers: int = 2
    """recompute=full: layers per recomputed segment; nothing is in flight between segments."""
    capacity: int = 0
    """Rows that an expert takes from one rank, layer and chunk; later ones are dropped. Then ranks exchange no counts
    and the host waits for none. 0: no limit, nothing is dropped."""
    kernels: Kernels = Kernels.auto
    """Fused kernels for routers, routed experts, norms and the residual stream. auto: on CUDA, experts in bf16 only;
    triton: or an error that says why not; reference: their plain-torch twins, on any device; off: none of them."""
    overlap_gradients: bool = True
    """Gradients of replicated parameters are summed over ranks under the last backward of a step; else behind it."""
    gloo_threads: GlooThreads = GlooThreads.auto
    """On CPU: when gloo's threads, which move the bytes, get a core. realtime: at once, ahead of compute (needs a right
    that root has); ordinary: in line with it; auto: realtime where this process may."""
    shard_optimizer: bool = False
    """Ranks that hold the same parameters divide their update: of 8 bytes of AdamW state per parameter each keeps its
    share, and every step ends with a gather of what the others updated. Same bits. No effect on one rank."""
    link: LinkConfig = field(default_factory=LinkConfig)

    def check(self) -> None:
        """Refuse values that no number of ranks can use, also where they would not be looked at.

        Raises:
            ValueError: one line with the key, its value and the bound.
        """
        lowest = {"ep": 0, "tp": 1, "chunks": 1, "recompute_layers": 1, "capacity": 0}
        for key, value, low in ((key, getattr(self, key), low) for key, low in lowest.items()):
            if value < low:
                raise ValueError(f"parallel.{key}={value} is too small; use at least {low}")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "parallel.sequence_parallel=true with parallel.tp=1 has no ranks to share tokens among; set tp to 2 or "
                "more, or sequence_parallel=false"
            )
        if self.side_stream is not SideStream.none and self.tp > 1:
            raise ValueError(
                f"parallel.side_stream={self.side_stream} with parallel.tp={self.tp}: there a merge feeds a sum over "
                "the ranks, whose place is among those of compute; set side_stream=none or tp=1"
            )
        if not self.link.bandwidth_gbit_s > 0:
            raise ValueError(f"parallel.link.bandwidth_gbit_s={self.link.bandwidth_gbit_s} must be above 0")
        if not self.link.latency_us >= 0:
            raise ValueError(f"parallel.link.latency_us={self.link.latency_us} must be at least 0")


@dataclass(kw_only=True)
class BalanceConfig:
    """Load balancing of the routers."""

    aux_coefficient: float = 0.0
    """Weight of the auxiliary load-balancing loss; 0: off."""
    bias_rate: float = 0.0
    """Step of the bias update after each optimizer step, for routers with a selection bias; 0: off."""


@dataclass(kw_only=True)
class ProfileConfig:
    """Profiler traces of training steps."""

    steps: list[int] = field(default_factory=list)
    """Optimizer steps to trace, e.g. [20,21]; each rank writes traces/rank<r>_step<n>.json.gz in the run folder."""


@dataclass(kw_only=True)
class RunConfig:
    """Where results go and how the ranks start."""

    folder: str = "runs/run"
    """Run folder: checkpoints, metrics, resolved config, schedule, and the final model in model/."""
    resume: bool = False
    """Continue from the newest checkpoint in the run folder, or start afresh if there is none."""
    device: str = "auto"
    """cpu, cuda, or auto (cuda where there is one)."""
    timeout_s: int = 600
    """Seconds after which a rank that does not answer ends the job."""
    threads: int = 0
    """CPU threads per rank; 0: the cores of the machine shared evenly among its ranks."""


@dataclass(kw_only=True)
class FreshModelConfig:
    """A model to train from scratch."""

    family: str = "deepseek_v3"
    """Model family by its name, e.g. deepseek_v3, qwen3_moe or mixtral; a wrong one lists all."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of the family's transformers config, as hidden_size; model=demo or model=qwen3_tiny brings a set."""
    seed: int = 0
    """Seed of the initial weights."""


@dataclass(kw_only=True)
class CheckpointModelConfig:
    """A model to convert."""

    path: str = ""
    """Folder of the original, in transformers' format. It is the teacher, too."""
    dtype: str = "float32"
    """In what the teacher is held: float32, bfloat16, or auto (what the checkpoint has). The student is float32;
    training.precision says in what it computes."""
    export_dtype: str = "auto"
    """In what the repaired model is measured and written: float32, bfloat16, or auto (what the original is in)."""


@dataclass(kw_only=True)
class PretrainConfig:
    """farskip pretrain: train a model from scratch."""

    model: FreshModelConfig = field(default_factory=FreshModelConfig)
    wiring: WiringConfig = field(default_factory=lambda: WiringConfig(name="ordinary"))
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(folder="runs/pretrain"))


@dataclass(kw_only=True)
class DistillConfig:
    """farskip distill: rewire a pretrained model and repair it by self-distillation from its own original."""

    model: CheckpointModelConfig = field(default_factory=CheckpointModelConfig)
    wiring: WiringConfig = field(default_factory=WiringConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(folder="runs/distill"))


@dataclass(kw_only=True)
class ShowConfig:
    """What the demo measures and shows besides training."""

    heldout_batches: int = 8
    """Held-out batches per rank for the three measurements."""
    prompt: str = "    def __init__(self, name, value=None):\n        "
    """Text that the three models continue."""
    new_tokens: int = 48
    """Tokens of each continuation."""
    timed_steps: int = 4
    """Steps timed per schedule over the emulated link, serial and overlapped in turn; one more of each is traced."""

    def check(self) -> None:
        """Refuse values that leave nothing to show.

        Raises:
            ValueError: one line with the key, its value and the bound.
        """
        for key in ("heldout_batches", "new_tokens", "timed_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"show.{key}={getattr(self, key)} is too small; use at least 1")


def _demo_pretrain() -> TrainingConfig:
    return TrainingConfig(
        num_steps=390,
        log_every=25,
        tensorboard=True,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=40),
        heldout=HeldoutConfig(every_steps=130, num_batches=2),
        checkpoint=CheckpointConfig(every_steps=0, keep_last=1),
    )


def _demo_distill() -> TrainingConfig:
    return TrainingConfig(
        num_steps=160,
        log_every=20,
        tensorboard=True,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, weight_decay=0.0),
        heldout=HeldoutConfig(every_steps=40, num_batches=2),
        checkpoint=CheckpointConfig(every_steps=0, keep_last=1),
    )


@dataclass(kw_only=True)
class DemoConfig:
    """farskip demo: pretrain a small model, rewire it, measure the damage, repair it, show what was hidden."""

    model: FreshModelConfig = field(default_factory=FreshModelConfig)
    wiring: WiringConfig = field(default_factory=WiringConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: TrainingConfig = field(default_factory=_demo_pretrain)
    distill: TrainingConfig = field(default_factory=_demo_distill)
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(bias_rate=1e-3))
    parallel: ParallelConfig = field(
        default_factory=lambda: ParallelConfig(link=LinkConfig(kind=LinkKind.real, bandwidth_gbit_s=1.0))
    )
    show: ShowConfig = field(default_factory=ShowConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(folder="runs/demo", timeout_s=300))
    ranks: int = 2
    """Processes that the demo starts on this machine."""
