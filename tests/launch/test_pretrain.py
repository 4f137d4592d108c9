"""`farskip pretrain` as a user calls it, on one rank: what a run leaves behind, and that it can be continued."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import farskip
from farskip.launch.config import PretrainConfig
from farskip.launch.pretrain import pretrain
from farskip.launch.ranks import Ranks
from farskip.metrics import MetricsFiles
from farskip.schedule import Schedule

Command = Callable[[list[str]], tuple[int, str, str]]
FAMILIES = ("deepseek_v3", "qwen3_moe")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_equal_bits(actual: Path, expected: Path) -> None:
    mine, theirs = weights(actual), weights(expected)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert different == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_run_leaves(family: str, pretrained: Callable[[str], Path]) -> None:
    folder = pretrained(family)
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "schedule.json",
        "schedule.txt",
    }
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    assert ["heldout_cross_entropy" in line for line in metrics(folder)] == [False, True, False, True]
    checkpoints = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"best", "step_00000004"} <= checkpoints <= {"best", "step_00000002", "step_00000004"}
    schedule = Schedule.from_dict(json.loads((folder / "schedule.json").read_text()))
    assert schedule.timeline("forward") in (folder / "schedule.txt").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_loads_and_is_what_was_measured(family: str, pretrained: Callable[[str], Path]) -> None:
    """The exported weights are those of the best checkpoint: evaluated again they give its held-out loss."""
    from transformers import AutoTokenizer

    from farskip.evaluation import evaluate
    from farskip.launch.job import build_text
    from farskip.models.language_model import HFLanguageModel
    from farskip.training_protocols import SingleProcess

    folder = pretrained(family)
    config = read_config(folder)
    model = farskip.load(folder / "model")
    assert farskip.wiring_of(model).name == "ordinary"
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "model"))
    _, data = build_text(config.data, config.parallel, Ranks(rank=0, world_size=1, device="cpu"))
    result = evaluate(HFLanguageModel(model), data.heldout_batches(2), SingleProcess(model))
    best = min(line["heldout_cross_entropy"] for line in metrics(folder) if "heldout_cross_entropy" in line)
    assert result.cross_entropy == best


def read_config(folder: Path) -> PretrainConfig:
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(folder / "config.yaml"))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, PretrainConfig)
    return config


def test_the_written_config_reproduces_the_run(pretrained: Callable[[str], Path], tmp_path: Path) -> None:
    config = read_config(pretrained("deepseek_v3"))
    config.run.folder = str(tmp_path / "again")
    assert pretrain(Ranks(rank=0, world_size=1, device="cpu"), config)
    assert_equal_bits(tmp_path / "again", pretrained("deepseek_v3"))


def test_a_rewired_model_from_scratch(workshop: Any, farskip_command: Command, tmp_path: Path) -> None:
    words = workshop.pretrain(tmp_path / "run", "wiring.name=farskip", "wiring.layers=last:2", "training.num_steps=2")
    assert farskip_command(words)[0] == 0
    wiring = farskip.wiring_of(farskip.load(tmp_path / "run" / "model"))
    assert str(wiring) == "farskip on 2 of 3 layers (1-2)"
    assert str(wiring) in (tmp_path / "run" / "schedule.txt").read_text()


def stopping_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes when this step has been reported, and is acted on at the end of the next one."""
    write = MetricsFiles.write

    def write_and_stop(self: MetricsFiles, report: Any) -> None:
        write(self, report)
        if report.step == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricsFiles, "write", write_and_stop)


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_after_sigterm_is_exact(family: str, workshop: Any, farskip_command: Command, tmp_path: Path) -> None:
    more = ["training.num_steps=6", "training.heldout.every_steps=3", "wiring.name=farskip"]
    assert farskip_command(workshop.pretrain(tmp_path / "whole", *more, family=family))[0] == 0
    words = workshop.pretrain(tmp_path / "cut", *more, family=family)
    with pytest.MonkeyPatch.context() as patch:
        stopping_at(3, patch)
        code, out, error = farskip_command(words)
    assert (code, error) == (143, "")
    assert "shutdown requested after step 4" in out
    assert not (tmp_path / "cut" / "model").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    code, out, _ = farskip_command([*words, "run.resume=true"])
    assert code == 0
    assert "step 4/6" not in out
    assert_equal_bits(tmp_path / "cut", tmp_path / "whole")
    whole, cut = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    timings = {"step_s", "tokens_per_s", "exposed_share"}
    assert [{k: v for k, v in line.items() if k not in timings} for line in cut] == [
        {k: v for k, v in line.items() if k not in timings} for line in whole
    ]


def test_a_multirun_ends_with_the_run_that_is_stopped(workshop: Any, farskip_command: Command, tmp_path: Path) -> None:
    words = workshop.pretrain(tmp_path / "${wiring.name}", "--multirun", "wiring.name=farskip,ladder")
    with pytest.MonkeyPatch.context() as patch:
        stopping_at(1, patch)
        code, out, _ = farskip_command(words)
    assert code == 143
    assert "== 1 of 2: " in out and "== 2 of 2: " not in out
    assert (tmp_path / "farskip" / "checkpoints" / "step_00000002").is_dir()
    assert not (tmp_path / "ladder").exists()


def test_a_multirun_leaves_one_run_each(workshop: Any, farskip_command: Command, tmp_path: Path) -> None:
    words = workshop.pretrain(tmp_path / "${wiring.name}", "--multirun", "wiring.name=farskip,ladder")
    assert farskip_command(words)[0] == 0
    for name in ("farskip", "ladder"):
        assert farskip.wiring_of(farskip.load(tmp_path / name / "model")).name == name


def test_resume_of_a_finished_run_changes_nothing(workshop: Any, farskip_command: Command, tmp_path: Path) -> None:
    words = workshop.pretrain(tmp_path / "run", "run.resume=true")
    assert farskip_command(words)[0] == 0  # nothing to resume from: starts afresh
    before, lines = weights(tmp_path / "run"), metrics(tmp_path / "run")
    assert farskip_command(words)[0] == 0
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics(tmp_path / "run") == lines


def test_a_resumed_run_keeps_its_model(
    workshop: Any, farskip_command: Command, pretrained: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also a key that the run so far left to transformers' default, which no shape tells."""
    shutil.copytree(pretrained("deepseek_v3"), tmp_path / "run", symlinks=True)
    words = workshop.pretrain(tmp_path / "run", "run.resume=true", "model.config.routed_scaling_factor=7")
    code, _, error = farskip_command(words)
    assert code == 2 and error.startswith("farskip pretrain: model.config={") and "routed_scaling_factor" in error
    assert f"the run in {tmp_path / 'run'} has model.config={{" in error and error.count("\n") == 1


def test_recompute_changes_nothing_but_rounding(workshop: Any, farskip_command: Command, tmp_path: Path) -> None:
    """DESIGN.md 4 for the weights of one step; over four steps of Adam rounding grows, hence the losses' bound."""
    words = workshop.pretrain(tmp_path / "full", "wiring.name=farskip", "parallel.recompute=full")
    assert farskip_command([*words, "parallel.recompute_layers=2"])[0] == 0
    assert farskip_command(workshop.pretrain(tmp_path / "none", "wiring.name=farskip"))[0] == 0
    full, none = metrics(tmp_path / "full"), metrics(tmp_path / "none")
    assert [line["loss"] for line in full] == pytest.approx([line["loss"] for line in none], rel=1e-4)
    assert full[0]["loss"] == none[0]["loss"]
    assert full[0]["grad_norm"] == pytest.approx(none[0]["grad_norm"], rel=1e-4)
    plans = [json.loads((tmp_path / name / "schedule.json").read_text()) for name in ("full", "none")]
    assert plans[0] != plans[1]


def test_selective_recompute_changes_no_bit_and_no_schedule(
    workshop: Any, farskip_command: Command, tmp_path: Path
) -> None:
    selective = workshop.pretrain(tmp_path / "selective", "wiring.name=farskip", "parallel.recompute=selective")
    assert farskip_command(selective)[0] == 0
    assert farskip_command(workshop.pretrain(tmp_path / "none", "wiring.name=farskip"))[0] == 0
    after = [weights(tmp_path / name) for name in ("selective", "none")]
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[1])
    plans = [json.loads((tmp_path / name / "schedule.json").read_text()) for name in ("selective", "none")]
    assert plans[0] == plans[1]


def test_which_kernels_run_is_said_once(
    workshop: Any, farskip_command: Command, tmp_path: Path, pretrained: Callable[[str], Path]
) -> None:
    code, out, _ = farskip_command(workshop.pretrain(tmp_path / "run", "parallel.kernels=reference"))
    assert code == 0
    line = (
        "kernels: router reference, experts reference, rows between ranks reference, streams and norms reference "
        "(kernels=reference)"
    )
    assert [each for each in out.splitlines() if each.startswith("kernels:")] == [line]
    ours, theirs = (metrics(folder)[0]["loss"] for folder in (tmp_path / "run", pretrained("deepseek_v3")))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_bf16(workshop: Any, farskip_command: Command, tmp_path: Path, pretrained: Callable[[str], Path]) -> None:
    """bf16 keeps 8 bits: the first loss agrees to about 2^-8, and is not the fp32 one."""
    assert farskip_command(workshop.pretrain(tmp_path / "run", "training.precision=bf16"))[0] == 0
    ours, fp32 = metrics(tmp_path / "run")[0]["loss"], metrics(pretrained("deepseek_v3"))[0]["loss"]
    assert ours == pytest.approx(fp32, rel=2**-6)
    assert ours != fp32
    assert {tensor.dtype for name, tensor in weights(tmp_path / "run").items()} == {torch.float32}


def test_load_balancing_is_on_where_asked_for(workshop: Any, farskip_command: Command, tmp_path: Path) -> None:
    words = workshop.pretrain(tmp_path / "run", "balance.bias_rate=0.01", "balance.aux_coefficient=0.01")
    assert farskip_command(words)[0] == 0
    assert {"balance/max_load", "balance/aux_loss"} <= metrics(tmp_path / "run")[0].keys()
    biases = [tensor for name, tensor in weights(tmp_path / "run").items() if name.endswith("e_score_correction_bias")]
    assert biases and any(tensor.abs().max() > 0 for tensor in biases)


BAD = {
    "no text": (["data.path=/nowhere"], "data.path=/nowhere does not exist; "),
    "no family": (["model.family=nothing"], "model.family='nothing' is not supported; use one of "),
    "no such key of the model": (["model.config.hiden_size=3"], "model.config has keys that deepseek_v3 does not know"),
    "wiring": (["wiring.name=farskipp"], "wiring 'farskipp'"),
    "layers": (["wiring.name=farskip", "wiring.layers=2:9"], "layers"),
    "words as layers": (["wiring.name=farskip", "wiring.layers=some"], "layers"),
    "a step that does not exist": (["profile.steps=[0]"], "profile.steps=[0]: steps are counted from 1"),
    "balance without bias": (["balance.bias_rate=0.1"], "balance.bias_rate=0.1: the routers of this model"),
    "a negative step of biases": (["balance.bias_rate=-1"], "balance.bias_rate=-1.0 makes no sense; use 0 or more"),
    "a negative weight": (["balance.aux_coefficient=-1"], "balance.aux_coefficient=-1.0 makes no sense; use 0 or more"),
    "negative threads": (["run.threads=-3"], "run.threads=-3 is too small; use at least 0"),
    "no time": (["run.timeout_s=0"], "run.timeout_s=0 is too small; use at least 1"),
    "ep on one rank": (["parallel.ep=2"], "parallel.ep=2 needs as many ranks: start with torchrun --nproc-per-node"),
    "a side stream on one rank": (
        ["parallel.side_stream=merge"],
        "parallel.side_stream=merge has nothing to put aside on one rank: no rows travel; start with torchrun",
    ),
    "a capacity on one rank": (
        ["parallel.capacity=4"],
        "parallel.capacity=4 has nothing to bound on one rank: no rows",
    ),
    "an emulated link on one rank": (
        ["parallel.link.kind=emulated"],
        "parallel.link.kind=emulated has nothing to slow down on one rank: nothing travels; start with torchrun",
    ),
    "a step beyond the end": (
        ["profile.steps=[3,99]"],
        "profile.steps=[3, 99]: step 99 is beyond training.num_steps=4; leave it out",
    ),
    "no cuda": (["run.device=cuda"], "run.device=cuda, but torch sees no CUDA device here; use run.device=cpu"),
    "device": (["run.device=tpu"], "run.device='tpu' is unknown; use cpu, cuda or auto"),
    "schedule": (["parallel.schedule=sereal"], "parallel.schedule: Invalid value 'sereal', expected"),
    "layers of a segment": (["parallel.recompute=full", "parallel.recompute_layers=0"], "parallel.recompute_layers=0"),
    "a negative capacity": (["parallel.capacity=-1"], "parallel.capacity=-1 is too small; use at least 0"),
    "kernels": (["parallel.kernels=tritn"], "parallel.kernels: Invalid value 'tritn', expected"),
    "kernels without a GPU": (["parallel.kernels=triton"], "backend 'triton' cannot run on a cpu tensor; "),
    "shares of one rank": (
        ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel=true with parallel.tp=1 has no ranks to share tokens among; set tp to 2 or more",
    ),
    "a side stream beside sums over ranks": (
        ["parallel.side_stream=merge", "parallel.tp=2"],
        "parallel.side_stream=merge with parallel.tp=2: there a merge feeds a sum over the ranks",
    ),
    "bandwidth": (["parallel.link.bandwidth_gbit_s=0"], "parallel.link.bandwidth_gbit_s=0.0 must be above 0"),
    "a NaN": (["training.optimizer.learning_rate=1e30", "training.num_steps=3"], "step "),
    "heads": (["model.config.num_attention_heads=3"], "model.config.num_attention_heads=3 is no multiple of num_key_"),
    "too few experts": (
        ["model.config.num_experts_per_tok=5"],
        "model.config.num_experts_per_tok=5 must be at least 1 ",
    ),
    "no layers": (
        ["model.config.num_hidden_layers=0"],
        "model.config.num_hidden_layers=0 is too small; use at least 1",
    ),
    "a negative size": (["model.config.hidden_size=-64"], "model.config.hidden_size=-64 is too small; use at least 1"),
    "a word as size": (["model.config.hidden_size=big"], "model.config does not make a deepseek_v3: "),
    "steps": (["training.num_steps=0"], "training.num_steps=0 is too small; it must be at least 1"),
    "a file as folder": (["run.folder=/etc/hostname"], "run.folder=/etc/hostname is a file: give a folder"),
    "below a file": (["run.folder=/etc/hostname/run"], "run.folder=/etc/hostname/run: cannot write in /etc/hostname"),
    "a folder that cannot be": (["run.folder=/proc/run"], ""),
}


@pytest.mark.parametrize(("more", "answer"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    more: list[str], answer: str, workshop: Any, farskip_command: Command, tmp_path: Path
) -> None:
    family = "qwen3_moe" if "balance.bias_rate=0.1" in more else "deepseek_v3"
    code, _, error = farskip_command(workshop.pretrain(tmp_path / "run", *more, family=family))
    assert code == 2
    assert error.startswith(f"farskip pretrain: {answer}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".tmp")]


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("model.family=qwen", "model.family='qwen' is not supported"),
        ("model.config.hiden_size=3", "model.config has keys"),
        ("wiring.name=farskp", "wiring 'farskp' is unknown; did you mean 'farskip'"),
        ("data.heldout_fraction=0", "there is no held-out text"),
    ],
)
def test_a_typo_is_found_before_the_text_is_read(
    word: str, answer: str, workshop: Any, farskip_command: Command, tmp_path: Path
) -> None:
    more = [f"data.cache_dir={tmp_path / 'cache'}", word]
    code, out, error = farskip_command(workshop.pretrain(tmp_path / "run", *more))
    assert (code, out) == (2, "") and error.startswith(f"farskip pretrain: {answer}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(workshop: Any, farskip_command: Command, pretrained: Callable[[str], Path]) -> None:
    folder = pretrained("deepseek_v3")
    before = sorted(folder.rglob("*"))
    code, out, error = farskip_command(workshop.pretrain(folder))
    assert (code, out) == (2, "")
    assert error == (
        f"farskip pretrain: run.folder={folder} is not empty: give another folder, or run.resume=true to continue\n"
    )
    assert sorted(folder.rglob("*")) == before
