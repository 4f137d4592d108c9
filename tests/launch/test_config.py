"""Settings: what is documented, what is frozen, and what a wrong one is answered."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from farskip.launch.bench_config import BenchOverlapConfig
from farskip.launch.config import DemoConfig, DistillConfig, PretrainConfig
from farskip.launch.hydra_command import documented_keys, help_text, run_hydra
from farskip.wiring import select_layers

CONFIGS = {"pretrain": PretrainConfig, "distill": DistillConfig, "demo": DemoConfig}
Command = Callable[[list[str]], tuple[int, str, str]]


def composed(command: str, *argv: str) -> list[Any]:
    """The configurations that a command's job is called with."""
    seen: list[Any] = []
    run_hydra(command, CONFIGS[command], lambda config: seen.append(config) or True, argv, intro="")
    return seen


@pytest.mark.parametrize("command", CONFIGS)
def test_help_prints_every_key_its_default_and_its_meaning(command: str, command_output: Callable[..., str]) -> None:
    text = command_output(command, "--help")
    assert all(len(line) <= 120 for line in text.splitlines())
    words = " ".join(text.split())
    for key, default, meaning in documented_keys(composed(command)[0]):
        assert f"\n  {key}=" in text
        assert " ".join(meaning.split()) in words
        if isinstance(default, bool | int | float):
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            assert f"\n  {key}={shown}\n" in text


@pytest.fixture
def command_output(farskip_command: Command) -> Callable[..., str]:
    def call(*words: str) -> str:
        code, out, error = farskip_command(list(words))
        assert (code, error) == (0, "")
        return out

    return call


def test_help_shows_the_composed_default_not_that_of_the_class(command_output: Callable[..., str]) -> None:
    assert DistillConfig().training.optimizer.learning_rate != 5e-5
    assert "\n  training.optimizer.learning_rate=5e-05\n" in command_output("distill", "--help")
    assert "\n  data.batch_size=4\n" in command_output("demo", "--help")


def test_keys_and_defaults_are_frozen(check_snapshot: Callable[[str, str], None]) -> None:
    lines = []
    for command in CONFIGS:
        lines += [f"farskip {command}"]
        for key, default, _ in documented_keys(composed(command)[0]):
            lines.append(f"  {key}={default.value if isinstance(default, Enum) else default!r}")
    check_snapshot("\n".join(lines) + "\n", "config_keys.txt")


def test_a_key_without_a_meaning_is_refused() -> None:
    @dataclass
    class Section:
        told: int = 1
        """Is told."""
        untold: int = 2

    @dataclass
    class Config:
        section: Section = field(default_factory=Section)

    with pytest.raises(ValueError, match=r"Section\.untold is not documented"):
        list(documented_keys(Config()))


WRONG = {
    "section": ("trainig.num_steps=3", "there is no setting 'trainig.num_steps'; did you mean 'training.num_steps'?"),
    "leaf": ("data.pth=x", "there is no setting 'data.pth'; did you mean 'data.path'?"),
    "no section": ("num_steps=3", "there is no setting 'num_steps'; did you mean 'training.num_steps'?"),
    "nothing near": ("zzzz=1", "there is no setting 'zzzz'; --help lists them"),
    "added": ("+foo=1", "there is no setting 'foo'; --help lists them"),
    "hydra's own": ("hydra.verbose=true", "there is no setting 'hydra.verbose'; "),
    "removed": ("~data.path", "'~data.path': a setting cannot be taken away; give it another value, null is nothing"),
    "group": ("wiring=farskip", "'wiring' is a group of settings; give one of them, as wiring.name=value"),
    "group without value": ("training", "'training' is a group of settings; "),
    "no value": ("wiring.name", "'wiring.name' has no value; write wiring.name=value"),
    "a stray word": ("now", "'now' is no setting; write key=value"),
    "not an integer": ("training.num_steps=abc", "training.num_steps: Value 'abc' of type 'str' could not be conver"),
    "half an integer": ("parallel.ep=1.5", "parallel.ep: Value '1.5' of type 'float' could not be converted to Inte"),
    "not one of": (
        "parallel.recompute=half",
        "parallel.recompute: Invalid value 'half', expected one of [none, selective, full]",
    ),
    "not a list": (
        "data.patterns=abc",
        "data.patterns: Invalid value assigned: str is not a ListConfig, list or tuple",
    ),
    "open bracket": ("data.patterns=[a", "data.patterns=[a: "),
    "several values": ("training.num_steps=1,2", "training.num_steps=1,2 has several values: --multirun runs each"),
    "several layers": (
        "wiring.layers=0,2",
        "wiring.layers=0,2 has several values: --multirun runs each, a list is written wiring.layers=[0,2], ",
    ),
    "words as layers": ("wiring.layers=[a]", "wiring.layers: Cannot convert 'list' to string"),
    "no such model": ("model=foo", "there is no model=foo; choose demo or qwen3_tiny"),
    "interpolation": ("run.folder=${wiring.nme}", "run.folder: Interpolation key 'wiring.nme' not found"),
    "option": ("--verbose", "there is no option '--verbose'; settings are given as key=value, --help lists them"),
    "near option": ("--multirn", "there is no option '--multirn'; did you mean '--multirun'?"),
    "cfg": ("--cfg=hydra", "'--cfg hydra' is not known; --cfg job prints the configuration"),
}


@pytest.mark.parametrize(("word", "answer"), WRONG.values(), ids=WRONG)
def test_a_wrong_override_is_one_line(word: str, answer: str, farskip_command: Command) -> None:
    code, out, error = farskip_command(["pretrain", word])
    assert (code, out) == (2, "")
    assert error.startswith(f"farskip pretrain: {answer}")
    assert error.count("\n") == 1
    assert "search path" not in error.lower() and "full_key" not in error


def test_every_wrong_combination_is_refused_before_the_first_runs() -> None:
    seen: list[Any] = []
    argv = ["--multirun", "training.num_steps=1,x", "run.folder=${training.num_steps}"]
    with pytest.raises(ValueError, match=r"^training\.num_steps: Value 'x'"):
        run_hydra("pretrain", PretrainConfig, lambda config: seen.append(config) or True, argv, intro="")
    assert seen == []


def test_values_of_every_kind() -> None:
    (config,) = composed(
        "pretrain",
        "data.patterns=[*.md,'a b']",
        "data.max_documents=7",
        "training.optimizer.max_grad_norm=null",
        "training.precision=bf16",
        "profile.steps=[3,4]",
        "run.folder='a, b = c'",
        "data.path=\"with 'quotes'\"",
        "++run.resume=true",
        "wiring.layers=0\\,2",
    )
    assert config.data.patterns == ["*.md", "a b"]
    assert config.data.max_documents == 7
    assert config.training.optimizer.max_grad_norm is None
    assert config.training.precision == "bf16"
    assert config.profile.steps == [3, 4]
    assert config.run.folder == "a, b = c"
    assert config.data.path == "with 'quotes'"
    assert config.run.resume is True
    assert config.wiring.layers == "0,2"


@pytest.mark.parametrize("word", ["[0,2]", "[ 0, 2 ]", "'[0,2]'", "'0,2'", "0\\,2"])
def test_a_list_of_layers_needs_no_quotes(word: str) -> None:
    (config,) = composed("pretrain", f"wiring.layers={word}")
    assert select_layers(config.wiring.layers, 3) == (0, 2)


def test_layers_of_every_form_in_a_multirun() -> None:
    argv = ["-m", "wiring.layers=[0,2],last:2,1", "run.folder=${wiring.layers}"]
    assert [config.wiring.layers for config in composed("pretrain", *argv)] == ["[0,2]", "last:2", "1"]


def test_a_home_folder() -> None:
    (config,) = composed("pretrain", "data.path=~/my corpus")
    assert config.data.path == str(Path.home() / "my corpus")


def test_keys_of_the_model_may_be_new() -> None:
    assert "initializer_range" not in composed("pretrain")[0].model.config
    for prefix in ("", "+", "++"):
        (config,) = composed("pretrain", f"{prefix}model.config.initializer_range=0.5", "model.config.hidden_size=64")
        assert config.model.config["initializer_range"] == 0.5
        assert config.model.config["hidden_size"] == 64
        assert config.model.config["kv_lora_rank"] == 64  # what model=demo brings stays


def test_another_model() -> None:
    (config,) = composed("pretrain", "model=qwen3_tiny")
    assert config.model.family == "qwen3_moe"
    assert "kv_lora_rank" not in config.model.config


@pytest.mark.parametrize("command", [*CONFIGS, "bench_overlap"])
def test_the_examples_of_the_help_are_of_that_command(command: str) -> None:
    config_class = {**CONFIGS, "bench_overlap": BenchOverlapConfig}[command]
    lines = help_text(config_class(), "").splitlines()
    (swept,) = [shlex.split(line) for line in lines if line.startswith("  --multirun ")]
    (quoted,) = [re.findall(r"'.*'", line) for line in lines if line.startswith("A list is written")]
    for words, num_runs in ((swept, 2), (shlex.split(quoted[0]), 1)):
        seen: list[Any] = []
        run_hydra(command, config_class, lambda config, seen=seen: seen.append(config) or True, words, intro="")
        assert len(seen) == num_runs


def test_multirun_runs_every_combination(capsys: pytest.CaptureFixture[str]) -> None:
    configs = composed(
        "distill",
        "-m",
        "wiring.name=farskip,ladder",
        "training.seed=range(2)",
        "run.folder=runs/${wiring.name}_${training.seed}",
    )
    seen = [(config.wiring.name, config.training.seed, config.run.folder) for config in configs]
    assert seen == [
        ("farskip", 0, "runs/farskip_0"),
        ("farskip", 1, "runs/farskip_1"),
        ("ladder", 0, "runs/ladder_0"),
        ("ladder", 1, "runs/ladder_1"),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "== 1 of 4: wiring.name=farskip training.seed=0"
    assert len(lines) == 4


def test_multirun_over_models() -> None:
    argv = ["--multirun", "model=demo,qwen3_tiny", "run.folder=runs/${model.family}"]
    assert [config.run.folder for config in composed("pretrain", *argv)] == ["runs/deepseek_v3", "runs/qwen3_moe"]


def test_multirun_refuses_one_folder_for_two() -> None:
    with pytest.raises(ValueError, match=r"two combinations write to run.folder=runs/distill; .*runs/\$\{wiring.name"):
        composed("distill", "--multirun", "wiring.name=farskip,ladder")


def test_multirun_ends_with_the_run_that_was_asked_to_stop() -> None:
    seen: list[str] = []
    argv = ["--multirun", "wiring.name=farskip,ladder", "run.folder=${wiring.name}"]
    run_hydra("distill", DistillConfig, lambda config: bool(seen.append(config.wiring.name)), argv, intro="")
    assert seen == ["farskip"]


def test_cfg_prints_what_would_run(command_output: Callable[..., str]) -> None:
    from omegaconf import OmegaConf

    for words in (["--cfg", "job"], ["-c", "job"], ["--cfg=job"], ["--cfg", "job", "--resolve"]):
        printed = command_output("distill", "wiring.name=ladder", "run.folder=x/${wiring.name}", *words)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DistillConfig), OmegaConf.create(printed)))
        assert config == composed("distill", "wiring.name=ladder", "run.folder=x/ladder")[0]


def test_nothing_is_written_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    composed("distill", "--multirun", "wiring.name=farskip,ladder", "run.folder=${wiring.name}")
    assert list(tmp_path.iterdir()) == []
