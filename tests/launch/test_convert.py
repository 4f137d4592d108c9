"""`farskip convert`: exit codes, what it prints, and what it leaves behind."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import farskip
from farskip.launch.convert import parser
from farskip.models.testing_models import tiny_model

Call = Callable[[list[str]], tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Qwen3-MoE. To be read only."""
    folder = tmp_path_factory.mktemp("convert") / "in"
    tiny_model("qwen3_moe").save_pretrained(folder, max_shard_size="60KB")
    return folder


def copy_of(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_options_are_frozen() -> None:
    """A new option is a decision: it is added here, in docs/convert.md and in the changelog."""
    options = {option for action in parser()._actions for option in action.option_strings}
    assert options == {"-h", "--help", "--wiring", "--layers", "--to"}


def test_it_says_what_it_wrote(checkpoint: Path, tmp_path: Path, farskip_command: Call) -> None:
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--wiring", "farskip", "--layers", "last:2"]
    code, out, error = farskip_command(words)
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: qwen3_moe, farskip on 2 of 4 layers (2-3)"
    assert lines[1].startswith("files: 7 of tensors, 1 others; ") and lines[1].endswith(" kB")
    assert len(lines) == 2
    assert str(farskip.wiring_of(farskip.load(tmp_path / "out"))) == "farskip on 2 of 4 layers (2-3)"


def test_layers_as_a_list_and_what_is_left_out(checkpoint: Path, tmp_path: Path, farskip_command: Call) -> None:
    folder = copy_of(checkpoint, tmp_path / "in")
    (folder / "pytorch_model.bin").touch()
    words = ["convert", str(folder), str(tmp_path / "out"), "--wiring=ladder", "--layers=[0, 2]"]
    code, out, _ = farskip_command(words)
    assert code == 0
    assert "ladder on 2 of 4 layers (0, 2)" in out and out.endswith("left out: pytorch_model.bin\n")


def test_instellas_lie_is_printed(tmp_path: Path, farskip_command: Call) -> None:
    changes = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
    tiny_model("deepseek_v3", **changes).save_pretrained(tmp_path / "in")
    words = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--wiring", "farskip", "--to", "instella"]
    code, out, error = farskip_command(words)
    assert code == 0 and "instella_moe, farskip on 4 of 4 layers" in out
    assert error.startswith("farskip convert: note: config.json says model_type deepseek_v3") and error.count("\n") == 1


def bad(words: list[str], says: str, call: Call) -> None:
    code, out, error = call(["convert", *words])
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert error.startswith("farskip convert: ") and says in error


def test_bad_input_is_one_line_and_leaves_nothing(checkpoint: Path, tmp_path: Path, farskip_command: Call) -> None:
    out = str(tmp_path / "out")
    torn = copy_of(checkpoint, tmp_path / "torn")
    file = sorted(torn.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-300])
    lacking = copy_of(checkpoint, tmp_path / "lacking")
    index = json.loads((lacking / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = sorted(torn.glob("*.safetensors"))[0].name
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    before = sorted(path.name for path in tmp_path.iterdir())
    bad([str(tmp_path / "absent"), out], "no config.json there", farskip_command)
    bad([str(torn), out, "--wiring", "farskip"], "incomplete or damaged", farskip_command)
    bad([str(lacking), out, "--wiring", "farskip"], "missing tensor model.extra.weight", farskip_command)
    bad([str(checkpoint), out, "--wiring", "farskp"], "did you mean 'farskip'", farskip_command)
    bad([str(checkpoint), out, "--wiring", "farskip", "--layers", "9:12"], "STOP <= 4", farskip_command)
    bad([str(checkpoint), out, "--wiring", "farskip", "--layers", "[1,x]"], "is not understood", farskip_command)
    bad([str(checkpoint), out, "--wiring", "farskip", "--layers", "[]"], "names no layer", farskip_command)
    bad([str(checkpoint), out, "--layers", "last:1"], "needs a wiring", farskip_command)
    bad([str(checkpoint), out, "--to", "instella"], "cannot be said in Instella-MoE's format", farskip_command)
    bad([str(checkpoint), str(checkpoint)], "the output is the checkpoint itself", farskip_command)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("words", [["--wring", "farskip"], ["--to", "gguf"], ["third"]], ids=str)
def test_a_wrong_option_is_exit_code_2(
    words: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from farskip.launch.main import main

    with pytest.raises(SystemExit) as ended:
        main(["convert", str(checkpoint), str(tmp_path / "out"), *words])
    assert ended.value.code == 2 and words[-1] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", ["0,2", "[0,2]", "2"])
def test_layers_in_numbers(layers: str, checkpoint: Path, tmp_path: Path, farskip_command: Call) -> None:
    words = ["convert", str(checkpoint), str(tmp_path / "out"), "--wiring", "farskip", "--layers", layers]
    code, out, _ = farskip_command(words)
    assert code == 0 and f"({layers.strip('[]').replace(',', ', ')})" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_midway_leaves_nothing(
    number: signal.Signals, checkpoint: Path, tmp_path: Path, farskip_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    sendfile, before, calls = os.sendfile, signal.getsignal(signal.SIGTERM), []

    def interrupted(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return sendfile(*arguments)

    monkeypatch.setattr(os, "sendfile", interrupted)
    out = tmp_path / "folder" / "out"
    seen = farskip_command(["convert", str(checkpoint), str(out), "--wiring=farskip"])
    assert seen == (130, "", "farskip convert: interrupted\n")
    assert len(calls) <= 4 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bar_only_on_a_terminal(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farskip.launch.convert import main

    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main([str(checkpoint), str(tmp_path / "out"), "--wiring", "farskip"]) == 0
        terminal.flush()
        seen = os.read(ours, 65536)
    os.close(ours)
    assert "━".encode() in seen and b"kB" in seen


WITHOUT_TRANSFORMERS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Block())
from farskip.launch.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_needs_no_transformers(checkpoint: Path, tmp_path: Path) -> None:
    """Whose import would take longer than copying some gigabytes."""
    words = [sys.executable, "-P", "-c", WITHOUT_TRANSFORMERS, "convert", str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run([*words, "--wiring=farskip"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert farskip.wiring_of(farskip.load(tmp_path / "out")).name == "farskip"


@pytest.mark.slow
def test_a_disk_that_is_full(checkpoint: Path, tmp_path: Path, require: Callable[..., str]) -> None:
    """A file system of 600 kB in memory; a file on it takes the room after the check for it."""
    require("root")
    mount = require("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run([mount, "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], check=True)
    late = "import sys, os\nfrom farskip.models import convert\nimport farskip.models.convert as m\n" \
           "m.disk_usage = lambda path: type('Usage', (), {'free': 10**12})\n" \
           "from farskip.launch.main import main\nsys.exit(main(sys.argv[1:]))"  # fmt: skip
    try:
        (disk / "other").write_bytes(bytes(450_000))
        for program, says in (
            (late, "no space left on its disk"),
            (late.replace("m.disk", "#"), "are free on the disk"),
        ):
            words = [sys.executable, "-P", "-c", program, "convert", str(checkpoint), str(disk / "out")]
            done = subprocess.run([*words, "--wiring=farskip"], capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
            assert says in done.stderr
            assert [path.name for path in disk.iterdir()] == ["other"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
