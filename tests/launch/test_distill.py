"""`farskip distill` as a user calls it, on one rank: the conversion, its report, chat data, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import farskip
from farskip.trace import inspect

Command = Callable[[list[str]], tuple[int, str, str]]
Runs = Callable[[str], Path]
FAMILIES = ("deepseek_v3", "qwen3_moe")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(report: str) -> dict[str, list[str]]:
    """Model -> the cells of its row in the report's first table."""
    rows = re.findall(r"^\| (original|rewired|repaired) \| (.*) \|$", report, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_conversion_leaves(family: str, distilled: Runs, pretrained: Runs) -> None:
    folder = distilled(family)
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "damage.png",
        "loss.png",
        "metrics.jsonl",
        "model",
        "report.md",
        "schedule.json",
        "schedule.txt",
        "traces",
    }
    for picture in ("damage.png", "loss.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert str(farskip.wiring_of(farskip.load(folder / "model"))) == "farskip on 3 of 3 layers (0-2)"
    assert json.loads((folder / "model" / "config.json").read_text())["model_type"] == f"farskip_{family}"
    before = load_file(pretrained(family) / "model" / "model.safetensors")
    after = load_file(folder / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_says_what_was_measured(family: str, distilled: Runs, pretrained: Runs) -> None:
    """Original: what pretraining measured for its best checkpoint. Repaired: the best of distillation. All measured
    once more on the same text, hence to the printed digits."""
    folder = distilled(family)
    rows = table((folder / "report.md").read_text())
    original = min(line["heldout_cross_entropy"] for line in metrics(pretrained(family)) if "heldout_kl" not in line
                   and "heldout_cross_entropy" in line)  # fmt: skip
    best = min((line for line in metrics(folder) if "heldout_kl" in line), key=lambda line: line["heldout_kl"])
    assert rows["original"][0].startswith(f"{original:.4f} ± ")
    assert rows["original"][2] == "-"
    assert rows["repaired"][0] == f"{best['heldout_cross_entropy']:.4f} ± {best['heldout_cross_entropy_ci95']:.4f}"
    assert rows["repaired"][2] == f"{best['heldout_kl']:.4f} ± {best['heldout_kl_ci95']:.4f}"
    assert float(rows["rewired"][2].split(" ")[0]) > float(rows["repaired"][2].split(" ")[0]) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_traces_of_the_asked_steps(family: str, distilled: Runs) -> None:
    folder = distilled(family)
    assert {path.name for path in (folder / "traces").iterdir()} == {"rank0_step2.json.gz", "rank0_step3.json.gz"}
    report = inspect([folder / "traces" / "rank0_step2.json.gz"])
    assert len(report.ranks) == 1


def test_the_tokenizer_is_the_models_own(distilled: Runs, pretrained: Runs) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        ours = json.loads((distilled("qwen3_moe") / "model" / name).read_text())
        assert ours == json.loads((pretrained("qwen3_moe") / "model" / name).read_text())
    assert f"tokenizer: {pretrained('qwen3_moe') / 'model'}" in (distilled("qwen3_moe") / "config.yaml").read_text()


def test_resume_is_exact(workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path) -> None:
    """The second half of a run that was cut off after its checkpoint of step 2, as by a power failure."""
    words = workshop.distill(
        tmp_path / "whole",
        pretrained("deepseek_v3") / "model",
        "training.checkpoint.keep_last=9",
        "profile.steps=[1,3]",
    )
    assert farskip_command(words)[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    for gone in ("model", "traces", "report.md", "checkpoints/step_00000004", "checkpoints/best"):
        path = tmp_path / "cut" / gone
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    code, out, _ = farskip_command([*words, f"run.folder={tmp_path / 'cut'}", "run.resume=true"])
    assert code == 0
    assert "step 2/4" not in out and "step 3/4" in out
    assert [path.name for path in (tmp_path / "cut" / "traces").iterdir()] == ["rank0_step3.json.gz"]
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert table((tmp_path / "cut" / "report.md").read_text()) == table((tmp_path / "whole" / "report.md").read_text())


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("wiring.name=ladder", "wiring.name=ladder, and the run in {folder} has wiring.name=farskip"),
        ("wiring.stage_steps=2", "wiring.stage_steps=2, and the run in {folder} has wiring.stage_steps=0"),
        ("model.path={other}", "model.path={other}, and the run in {folder} has model.path={original}"),
        ("training.num_steps=3", "training.num_steps=3, and the run in {folder} is at step 4: give 4 or more"),
        ("data.seed=3", "data.seed"),
    ],
)
def test_a_resumed_run_keeps_what_it_is(
    word: str, says: str, workshop: Any, farskip_command: Command, pretrained: Runs, distilled: Runs, tmp_path: Path
) -> None:
    """Weights fit another wiring and the divergence from another original looks like one, so nothing else would
    notice. What is refused leaves the record of the run as it was."""
    folder = tmp_path / "run"
    shutil.copytree(distilled("deepseek_v3"), folder, symlinks=True)
    record = (folder / "config.yaml").read_text()
    original, other = (pretrained(name) / "model" for name in ("deepseek_v3", "qwen3_moe"))
    words = workshop.distill(folder, original, "run.resume=true", word.format(other=other))
    code, _, err = farskip_command(words)
    assert code == 2 and says.format(folder=folder, original=original, other=other) in err and err.count("\n") == 1
    assert (folder / "config.yaml").read_text() == record and not list(folder.glob("config.*.yaml"))


def test_a_resumed_run_says_what_it_does_otherwise_and_keeps_the_record(
    workshop: Any, farskip_command: Command, pretrained: Runs, distilled: Runs, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(distilled("deepseek_v3"), folder, symlinks=True)
    before = (folder / "config.yaml").read_text()
    more = ["run.resume=true", "training.num_steps=5", "training.optimizer.learning_rate=2e-5"]
    code, out, err = farskip_command(workshop.distill(folder, pretrained("deepseek_v3") / "model", *more))
    assert (code, err) == (0, "")
    assert f"{folder}: goes on after step 4, with training.num_steps=5 (was 4), " in out
    assert "training.optimizer.learning_rate=2e-05 (was " in out
    assert (folder / "config.1.yaml").read_text() == before
    assert "num_steps: 5" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(("export_dtype", "found"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_checkpoint_in_bf16_comes_back_in_bf16(
    export_dtype: str, found: torch.dtype, workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path
) -> None:
    """The teacher is held as it is, the student is trained in float32."""
    original = farskip.load(pretrained("qwen3_moe") / "model", dtype=torch.bfloat16)
    farskip.save(original, tmp_path / "bf16")
    tokenizer = f"data.tokenizer={pretrained('qwen3_moe') / 'model'}"
    more = ["model.dtype=auto", f"model.export_dtype={export_dtype}", tokenizer]
    code, out, err = farskip_command(workshop.distill(tmp_path / "run", tmp_path / "bf16", *more))
    assert (code, err) == (0, "") and "repaired: " in out
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {found}


def test_sigterm_leaves_a_checkpoint_and_no_half_report(
    workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from farskip.metrics import MetricsFiles

    write = MetricsFiles.write
    monkeypatch.setattr(MetricsFiles, "write", lambda self, report: (write(self, report), signal.raise_signal(15))[0])
    code, out, error = farskip_command(workshop.distill(tmp_path / "run", pretrained("qwen3_moe") / "model"))
    assert (code, error) == (143, ""), "a job script must not go on as if the run was done"
    assert (
        "shutdown requested after step 2; the same command with run.resume=true goes on from there" in out
        and "repaired" not in out
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "schedule.json",
        "schedule.txt",
    }
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


STAGED = ["wiring.stage_layers=2", "wiring.stage_steps=2"]


def test_layers_are_rewired_in_stages(
    workshop: Any, farskip_command: Command, pretrained: Runs, distilled: Runs, tmp_path: Path
) -> None:
    """Steps of the first stage are those of a run with its layers only; the best weights are of the last stage."""
    original = pretrained("deepseek_v3") / "model"
    code, out, _ = farskip_command(workshop.distill(tmp_path / "staged", original, *STAGED))
    assert code == 0
    said = [line for line in out.splitlines() if line.startswith("step ") and "farskip on" in line]
    assert said == ["step 1: farskip on 2 of 3 layers (1-2)", "step 3: farskip on 3 of 3 layers (0-2)"]
    assert farskip_command(workshop.distill(tmp_path / "part", original, "wiring.layers=last:2"))[0] == 0
    staged, part, whole = (
        [(row["loss"], row["grad_norm"]) for row in metrics(folder)]
        for folder in (tmp_path / "staged", tmp_path / "part", distilled("deepseek_v3"))
    )
    assert staged[:2] == part[:2] and staged[2] not in (part[2], whole[2])
    model = farskip.load(tmp_path / "staged" / "model")
    assert str(farskip.wiring_of(model)) == "farskip on 3 of 3 layers (0-2)"
    assert (tmp_path / "staged" / "checkpoints" / "best").resolve().name.endswith("4")


def test_a_resumed_run_goes_on_in_its_stage(
    workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path
) -> None:
    """A stage ends between two checkpoints."""
    stages = ["wiring.stage_layers=2", "wiring.stage_steps=3", "training.checkpoint.keep_last=9"]
    words = workshop.distill(tmp_path / "whole", pretrained("deepseek_v3") / "model", *stages)
    assert farskip_command(words)[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    for gone in ("model", "checkpoints/step_00000004"):
        shutil.rmtree(tmp_path / "cut" / gone)
    (tmp_path / "cut" / "checkpoints" / "best").unlink()
    code, out, _ = farskip_command([*words, f"run.folder={tmp_path / 'cut'}", "run.resume=true"])
    assert code == 0
    said = [line for line in out.splitlines() if line.startswith("step ") and "farskip on" in line]
    assert said == ["step 3: farskip on 2 of 3 layers (1-2)", "step 4: farskip on 3 of 3 layers (0-2)"]
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["wiring.stage_layers=1"], "wiring.stage_steps=0: stages need at least 1 layer and 1 step each"),
        (["wiring.stage_steps=1"], "wiring.stage_layers=0: stages need at least 1 layer and 1 step each"),
        (
            ["wiring.stage_layers=1", "wiring.stage_steps=2"],
            "the last of 3 stages would begin at step 5, training.num_steps=4 end before",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(
    words: list[str], says: str, workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path
) -> None:
    code, _, err = farskip_command(workshop.distill(tmp_path / "run", pretrained("deepseek_v3") / "model", *words))
    assert code == 2 and says in err and err.count("\n") == 1


def test_other_wirings_start_from_a_converted_model(
    workshop: Any, farskip_command: Command, distilled: Runs, tmp_path: Path
) -> None:
    """The teacher is the model at model.path as it is wired there, and so is a layer whose stage has not come."""
    words = workshop.distill(tmp_path / "run", distilled("deepseek_v3") / "model", "wiring.name=ladder", *STAGED)
    code, out, _ = farskip_command(words)
    assert code == 0
    said = [line for line in out.splitlines() if line.startswith("step ") and " layers " in line]
    assert said == ["step 1: custom on 3 of 3 layers (0-2)", "step 3: ladder on 3 of 3 layers (0-2)"]
    assert farskip.wiring_of(farskip.load(tmp_path / "run" / "model")).name == "ladder"


def test_dtype_and_bf16(workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path) -> None:
    words = workshop.distill(tmp_path / "run", pretrained("qwen3_moe") / "model", "training.precision=bf16")
    assert farskip_command(words)[0] == 0
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").values()}
    assert dtypes == {torch.float32}


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_trains_on_the_assistants_turns_only(
    workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path
) -> None:
    """The number of labels that the run counted is that of the assistant's tokens, and another user changes no loss."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained("qwen3_moe") / "model")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    answer, question = "the cat sees a river.", "what does the cat see?"
    conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": conversation}) + "\n") * 8)
    length = len(tokenizer.apply_chat_template(conversation, tokenize=True)["input_ids"])
    words = workshop.pretrain(
        tmp_path / "run",
        f"data.path={tmp_path / 'chat.jsonl'}",
        f"data.heldout_path={tmp_path / 'chat.jsonl'}",
        "data.heldout_fraction=0",
        f"data.tokenizer={tmp_path / 'tokenizer'}",
        f"data.sequence_length={length + 3}",
        "data.batch_size=8",
        family="qwen3_moe",
    )
    code, _, error = farskip_command(words)
    assert (code, error) == (0, "")
    trained = len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1  # and the token that ends it
    assert metrics(tmp_path / "run")[0]["loss_tokens"] == 8 * trained
    written = AutoTokenizer.from_pretrained(tmp_path / "run" / "model", trust_remote_code=False)
    assert written.chat_template == CHAT_TEMPLATE


def test_a_model_that_is_wired_so_already(
    workshop: Any, farskip_command: Command, distilled: Runs, tmp_path: Path
) -> None:
    path = distilled("qwen3_moe") / "model"
    code, out, error = farskip_command(workshop.distill(tmp_path / "run", path))
    assert (code, out) == (2, "")
    assert error == (
        f"farskip distill: wiring: {path} is wired as farskip on 3 of 3 layers (0-2) already: nothing to repair\n"
    )
    assert not (tmp_path / "run").exists()


BAD = {
    "no model": (["model.path=''"], "model.path is empty: give the folder of the original, e.g. model.path=/home/me/"),
    "no such model": (["model.path=/nowhere"], "load /nowhere: no config.json there; "),
    "dtype": (["model.dtype=int8"], "model.dtype='int8' is unknown; use one of float32, bfloat16, auto"),
    "no layers": (["wiring.layers=first:0"], ""),
    "ordinary": (["wiring.name=ordinary"], "wiring: "),
    "an empty list of layers": (
        ["wiring.layers=[]"],
        "layers '[]' names no layer; name one or more, as [0,4,5], or all",
    ),
    "layers beyond the end": (["wiring.layers=[0,7]"], "layers '[0,7]': layer 7 is outside 0..2 of this model"),
    "no text": (["data.path=''"], "data.path is empty; give a folder or file with text"),
    "nothing held out": (["data.heldout_fraction=0"], "there is no held-out text; set data.heldout_fraction above 0"),
    "too little text": (["data.batch_size=100000"], "the held-out text fills "),
    "tokenizer": (["data.tokenizer=/nowhere"], "data.tokenizer=/nowhere does not exist; "),
    "no held-out batches": (["training.heldout.num_batches=0"], "training.heldout.num_batches=0"),
}


@pytest.mark.parametrize(("more", "answer"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    more: list[str], answer: str, workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path
) -> None:
    code, _, error = farskip_command(workshop.distill(tmp_path / "run", pretrained("qwen3_moe") / "model", *more))
    assert code == 2
    assert error.startswith(f"farskip distill: {answer}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()
    assert "report.md" not in [path.name for path in tmp_path.rglob("*")]


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("data.path=/nowhere", "data.path=/nowhere does not exist"),
        ("wiring.name=farskp", "wiring 'farskp' is unknown; did you mean 'farskip'"),
        ("data.heldout_fraction=0", "there is no held-out text"),
    ],
)
def test_a_typo_is_found_before_a_model_is_read(
    word: str, answer: str, workshop: Any, farskip_command: Command, tmp_path: Path
) -> None:
    code, _, error = farskip_command(workshop.distill(tmp_path / "run", tmp_path / "no_model", word))
    assert code == 2 and error.startswith(f"farskip distill: {answer}")


def test_a_tokenizer_that_does_not_fit_the_model(
    workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path
) -> None:
    """A token that the model has no embedding for."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(pretrained("qwen3_moe") / "model" / "tokenizer.json"))
    tokenizer.add_tokens(["river"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    more = [f"data.tokenizer={tmp_path / 'tokenizer.json'}", "data.end_of_document='<|endoftext|>'"]
    code, _, error = farskip_command(workshop.distill(tmp_path / "run", pretrained("qwen3_moe") / "model", *more))
    assert code == 2
    assert error == (
        f"farskip distill: data.tokenizer={tmp_path / 'tokenizer.json'} has token ids up to 290, but the model has 290 "
        "embeddings: give the tokenizer of the model\n"
    )
    assert error.count("\n") == 1


def test_an_ordinary_run_says_nothing_on_stderr(
    workshop: Any, farskip_command: Command, pretrained: Runs, tmp_path: Path
) -> None:
    """No progress bars, no remarks of transformers; pytest turns any warning of Python into a failure."""
    code, out, error = farskip_command(workshop.distill(tmp_path / "run", pretrained("deepseek_v3") / "model"))
    assert (code, error) == (0, "")
    assert "\r" not in out
    for line in out.splitlines():
        assert re.match(r"kernels: |step |original: |rewired: |repaired: |report: |/", line), line


def test_the_libraries_get_their_voice_back(farskip_command: Command, distilled: Runs) -> None:
    import os

    from transformers.utils import logging

    distilled("qwen3_moe")
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.WARNING
    assert "KINETO_LOG_LEVEL" not in os.environ
