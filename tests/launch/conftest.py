"""Text, settings and finished runs that the tests of the commands share: made once per session, by the commands."""

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from farskip.launch.main import main

MODELS = {
    "deepseek_v3": [
        "model=demo",
        "model.config.n_routed_experts=4",
        "model.config.num_key_value_heads=2",
        "model.config.kv_lora_rank=16",
        "model.config.qk_nope_head_dim=8",
        "model.config.qk_rope_head_dim=8",
        "model.config.v_head_dim=8",
    ],
    "qwen3_moe": [
        "model=qwen3_tiny",
        "model.config.num_experts=4",
        "model.config.num_key_value_heads=2",
        "model.config.head_dim=8",
    ],
}
SMALL = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.moe_intermediate_size=24",
    "model.config.num_hidden_layers=3",
    "model.config.num_attention_heads=2",
    # with transformers' 0.02 a model this small hardly differs from its rewired form
    "model.config.initializer_range=0.2",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workshop:
    """A folder with text, and the settings of a tiny run on it.

    Attributes:
        folder: of everything that the session's commands write.
        text: the text.
    """

    folder: Path
    text: Path

    def data(self, *, batch_size: int = 2) -> list[str]:
        return [
            f"data.path={self.text}",
            f"data.cache_dir={self.folder / 'cache'}",
            "data.vocab_size=290",
            "data.sequence_length=32",
            f"data.batch_size={batch_size}",
            "data.heldout_fraction=0.3",
            "run.device=cpu",
        ]

    def training(self, *, steps: int = 4, section: str = "training") -> list[str]:
        settings = [
            f"num_steps={steps}",
            "log_every=1",
            "tensorboard=false",
            "heldout.every_steps=2",
            "heldout.num_batches=2",
            "optimizer.warmup_steps=2",
            "optimizer.learning_rate=0.01",
            "checkpoint.every_steps=2",
        ]
        return [f"{section}.{setting}" for setting in settings]

    def pretrain(self, folder: Path, *more: str, family: str = "deepseek_v3", batch_size: int = 2) -> list[str]:
        """The words of a whole `farskip pretrain`."""
        common = [*self.data(batch_size=batch_size), *self.training(), *MODELS[family], *SMALL]
        return ["pretrain", *common, f"run.folder={folder}", *more]

    def distill(self, folder: Path, original: Path, *more: str, batch_size: int = 2) -> list[str]:
        """The words of a whole `farskip distill`."""
        common = [*self.data(batch_size=batch_size), *self.training(), f"model.path={original}"]
        return ["distill", *common, f"run.folder={folder}", *more]


def write_text(folder: Path, *, num_documents: int = 40, seed: int = 0) -> Path:
    """Documents of words with a little grammar, so that there is something to learn."""
    source = random.Random(seed)
    nouns, verbs = ["cat", "stone", "river", "clock", "bird", "road"], ["sees", "holds", "loses", "follows"]
    folder.mkdir()
    for number in range(num_documents):
        sentences = [f"the {source.choice(nouns)} {source.choice(verbs)} a {source.choice(nouns)}." for _ in range(40)]
        (folder / f"document{number:02d}.txt").write_text(f"{number}: {' '.join(sentences)}\n")
    return folder


@pytest.fixture(autouse=True)
def _no_handler_is_left() -> Iterator[None]:
    """A command that fails before it trains leaves SIGTERM as it was."""
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    return Workshop(folder=folder, text=write_text(folder / "text"))


@pytest.fixture(scope="session")
def pretrained(workshop: Workshop) -> Callable[[str], Path]:
    """`pretrained("qwen3_moe")`: the run folder of a finished `farskip pretrain`. To be read only."""

    def run(family: str) -> Path:
        folder = workshop.folder / f"pretrained_{family}"
        if not folder.exists():
            assert main(workshop.pretrain(folder, family=family)) == 0
        return folder

    return run


@pytest.fixture(scope="session")
def distilled(workshop: Workshop, pretrained: Callable[[str], Path]) -> Callable[[str], Path]:
    """`distilled("qwen3_moe")`: the run folder of a finished `farskip distill`, with two traced steps. Read only."""

    def run(family: str) -> Path:
        folder = workshop.folder / f"distilled_{family}"
        if not folder.exists():
            words = workshop.distill(folder, pretrained(family) / "model", "profile.steps=[2,3]")
            assert main(words) == 0
        return folder

    return run


@pytest.fixture
def farskip_command(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str, str]]:
    """`farskip_command(words)` calls `farskip` in this process: exit code, stdout, stderr."""

    def call(words: list[str]) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call
