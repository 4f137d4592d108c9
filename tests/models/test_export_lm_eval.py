"""lm-evaluation-harness, from the package index, runs a task of our making on a rewired checkpoint, without farskip."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

import farskip
from farskip.models.testing_models import tiny_model

TASK = "two_continuations"
WORDS = [f"w{number:02}" for number in range(97)]  # none begins another: two of them are special
QUESTIONS = [
    {
        "text": " ".join(WORDS[k] for k in (3 + n, 11 + 2 * n, 5 * n + 7)),
        "choices": [f"{WORDS[20 + n]} {WORDS[30 + n]}", WORDS[60 - n]],
        "answer": n % 2,
    }
    for n in range(8)
]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has lm-evaluation-harness, our torch and transformers, and no farskip.

    Our packages are put on its path; the line of the editable install of farskip is not read there.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    here = sysconfig.get_paths(vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})["purelib"]
    (Path(here) / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    installed = {
        distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()
    }
    pins = [f"{name}=={version}\n" for name, version in installed.items() if name != "farskip"]
    (folder / "pins.txt").write_text("".join(pins))
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    packages = ["lm_eval>=0.4.9", "accelerate"]
    finished = subprocess.run(
        [*install, "--constraint", folder / "pins.txt", *packages], capture_output=True, text=True
    )
    if finished.returncode:
        reason = f"pip cannot install {' '.join(packages)}: {finished.stderr.strip()[-300:]}"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    blocked = subprocess.run([python, "-I", "-c", "import farskip"], capture_output=True, text=True)
    assert "No module named 'farskip'" in blocked.stderr
    return python


def save_tokenizer(folder: Path) -> None:
    """One word, one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=WORDS[0], eos_token=WORDS[2]).save_pretrained(folder)


def write_task(folder: Path) -> None:
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(task))  # JSON is YAML


def log_likelihood(model: Any, text: str, continuation: str) -> float:
    ids = [WORDS.index(word) for word in f"{text} {continuation}".split()]
    count = len(continuation.split())
    with torch.no_grad():
        log_probabilities_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities_SV[place - 1, ids[place]]) for place in range(len(ids) - count, len(ids)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_harness_evaluates_the_rewired_function(family: str, harness: Path, tmp_path: Path) -> None:
    model = farskip.rewire(tiny_model(family, max_position_embeddings=64).eval(), "farskip")
    farskip.save(model, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    write_task(tmp_path / "tasks")
    command = [harness, "-I", "-m", "lm_eval", "--model", "hf", "--tasks", TASK, "--device", "cpu", "--batch_size", "3"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    finished = subprocess.run(command, cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == len(QUESTIONS)
    ordinary = farskip.rewire(farskip.load(tmp_path / "model"), "ordinary")
    right, apart = 0, 0.0
    for sample in samples:
        question = sample["doc"]
        seen = [float(response[0]) for response in sample["filtered_resps"]]
        expected = [log_likelihood(model, question["text"], choice) for choice in question["choices"]]
        assert seen == pytest.approx(expected, abs=1e-4)  # fp32; the harness runs them in batches
        others = [log_likelihood(ordinary, question["text"], choice) for choice in question["choices"]]
        apart = max([apart, *(abs(a - b) for a, b in zip(seen, others, strict=True))])
        right += int(expected.index(max(expected)) == question["answer"])
    assert apart > 0.1  # the ordinary function is another one
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["results"][TASK]["acc,none"] == right / len(QUESTIONS)
