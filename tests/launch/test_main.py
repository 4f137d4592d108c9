"""The `farskip` command itself: its table, its exit codes, what it imports, and the frozen command line."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from farskip.launch import main as command_line
from farskip.launch.main import COMMANDS, Command, dispatch, help_text, main

ROOT = Path(__file__).resolve().parents[2]
BLOCK_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "hydra"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Block())
from farskip.launch.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*words: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The console script of the environment that the tests run in, or the same call where none is installed."""
    script = Path(sys.executable).with_name("farskip")
    plain = "import sys; from farskip.launch.main import main; sys.exit(main())"
    start = [str(script)] if script.exists() else [sys.executable, "-P", "-c", plain]
    return subprocess.run([*start, *words], capture_output=True, text=True, env=os.environ | (env or {}), cwd=cwd)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A table of one command, `fake.behave`, whose `main` the test sets."""
    module = ModuleType("farskip.launch.fake_command")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(command_line, "COMMANDS", (Command(name="fake", module=module.__name__, help="Fakes."),))
    return module


def raising(error: BaseException, module: str = "farskip.launch.fake_command") -> object:
    """A `main` that raises from a module of that name."""
    space: dict[str, object] = {"__name__": module, "error": error}
    exec("def main(argv):\n    raise error", space)
    return space["main"]


def test_every_command_is_in_the_table_and_exists() -> None:
    """A module of launch/ that defines `main` is a command, and a command is such a module."""
    defined = set()
    for path in sorted((ROOT / "launch").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.stem != "main" and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            defined.add(f"farskip.launch.{path.stem}")
    listed = {command.module for command in COMMANDS}
    for module in sorted(listed & defined):
        if "COMMANDS" in (ROOT / "launch" / f"{module.rpartition('.')[2]}.py").read_text(encoding="utf-8"):
            listed |= {command.module for command in importlib.import_module(module).COMMANDS}
    assert listed == defined


def test_the_table_reads_well() -> None:
    names = [command.name for command in COMMANDS]
    assert len(set(names)) == len(names)
    for line in help_text("farskip", COMMANDS).splitlines():
        assert len(line) <= 110, line
    for command in COMMANDS:
        assert command.help[0].islower(), command
        assert not command.help.endswith("."), command


def test_help_without_torch() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", BLOCK_TORCH, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, help_text("farskip", COMMANDS), "")


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.name in ("trace", "simulate", "doctor")], ids=lambda c: c.name
)
def test_help_of_a_command_without_torch(command: Command) -> None:
    words = [sys.executable, "-P", "-c", BLOCK_TORCH, command.name, "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"farskip \d+\.\d+\.\d+\S*\n", done.stdout)


def test_no_command_is_a_mistake_that_prints_the_help() -> None:
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (2, "", help_text("farskip", COMMANDS))


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("distil", "farskip: there is no command 'distil'; did you mean 'distill'?\n"),
        ("zzz", "farskip: there is no command 'zzz'; farskip --help lists them\n"),
        ("--verbose", "farskip: there is no option '--verbose'; farskip --help lists them\n"),
    ],
)
def test_an_unknown_word_names_the_near_miss(word: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = (Command(name="distill", module="farskip.none", help="None"),)
    assert dispatch("farskip", table, [word]) == 2
    assert capsys.readouterr() == ("", advice)


def test_only_the_named_command_is_imported(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Command(name="other", module="farskip.launch.does_not_exist", help="Other.")
    monkeypatch.setattr(command_line, "COMMANDS", (missing, *command_line.COMMANDS))
    seen: list[list[str]] = []
    fake.main = lambda argv: seen.append(argv) or 5
    assert main(["fake", "a=1", "--help"]) == 5
    assert seen == [["a=1", "--help"]]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, FileNotFoundError])
def test_a_user_error_is_one_line(kind: type[Exception], fake: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fake.main = raising(kind("ep=3 does not divide 8 experts;\n  use 1, 2, 4 or 8"))
    assert main(["fake"]) == 2
    assert capsys.readouterr() == ("", "farskip fake: ep=3 does not divide 8 experts; use 1, 2, 4 or 8\n")


def test_an_error_of_others_says_where_it_comes_from(fake: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fake.main = raising(RuntimeError("bad"), "torch.nn")
    assert main(["fake"]) == 2
    assert capsys.readouterr().err == ("farskip fake: bad (RuntimeError in torch.nn; FARSKIP_DEBUG=1 shows where)\n")


def test_debug_shows_the_traceback(
    fake: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.main = raising(ValueError("bad"))
    for value, shown in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FARSKIP_DEBUG", value)
        assert main(["fake"]) == 2
        error = capsys.readouterr().err
        assert ("Traceback" in error) is shown
        assert error.endswith("farskip fake: bad\n")


@pytest.mark.parametrize("kind", [TypeError, AssertionError, KeyError, NotImplementedError, RecursionError])
def test_a_bug_is_not_hidden(kind: type[Exception], fake: ModuleType) -> None:
    fake.main = raising(kind("ours"))
    with pytest.raises(kind, match="ours"):
        main(["fake"])


def test_an_interrupt(fake: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fake.main = raising(KeyboardInterrupt())
    assert main(["fake"]) == 130
    assert capsys.readouterr().err == "farskip fake: interrupted\n"


def test_a_reader_that_goes_away() -> None:
    program = """
import sys, types
from farskip.launch import main as command_line
fake = types.ModuleType("fake_command")
def main(argv):
    for number in range(100000):
        print(number)
    return 0
fake.main = main
sys.modules["fake_command"] = fake
table = (command_line.Command(name="fake", module="fake_command", help="Fakes"),)
sys.exit(command_line.dispatch("farskip", table, ["fake"]))
"""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 141


def test_a_table_inside_a_command(fake: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    inner = (Command(name="overlap", module="farskip.launch.inner_command", help="Inner"),)
    fake.main = lambda argv: dispatch("farskip fake", inner, argv)
    assert main(["fake", "overlab"]) == 2
    assert capsys.readouterr().err == "farskip fake: there is no command 'overlab'; did you mean 'overlap'?\n"
    assert main(["fake", "--help"]) == 0
    assert "  overlap  Inner\n" in capsys.readouterr().out


def checkout(folder: Path) -> Path:
    """The least that looks like a checkout of this project."""
    for name in ("farskip/wiring.py", "triton_kernels/__init__.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    return folder


def test_refuses_to_start_when_the_checkout_shadows_triton_kernels(tmp_path: Path) -> None:
    done = run("zzz", env={"PYTHONPATH": str(checkout(tmp_path))}, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"farskip: the name triton_kernels finds {tmp_path / 'triton_kernels'}, a folder of a"
    )
    assert done.stderr.count("\n") == 1


def test_starts_beside_the_package_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").touch()
    assert run("--help", env={"PYTHONPATH": str(tmp_path)}).returncode == 0


def options(command: Command) -> list[str]:
    """What `farskip COMMAND --help` calls an option, sorted: names only, since Python's layout of help changes."""
    done = run(command.name, "--help", env={"COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    return sorted(set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", done.stdout)))


def test_the_command_line_is_frozen(check_snapshot: Callable[[str, str], None]) -> None:
    text = help_text("farskip", COMMANDS)
    for command in COMMANDS:
        text += f"\nfarskip {command.name}\n" + "".join(f"  {option}\n" for option in options(command))
    check_snapshot(text, "cli.txt")
