"""The `farskip` command: finds the sub-command, imports only its module, and turns user errors into one line.

Decides the table of commands and the exit codes: 0 done, 2 a mistake of the user's, 130 interrupted, 141 the reader of
the output went away, 143 asked to stop (SIGTERM) and saved. A bug of ours ends in its traceback. Importing this file
imports neither torch nor any command; a command is a module with `main(argv) -> int`.
"""

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

USER_MISTAKE = 2
INTERRUPTED = 130
READER_GONE = 141

DEBUG_VARIABLE = "FARSKIP_DEBUG"
"""Set to anything but "" or "0": a user error shows its traceback as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One sub-command.

    Attributes:
        name: What the user types.
        module: Where `main(argv) -> int` is; imported only when the command is called.
        help: One line for the list of commands.
    """

    name: str
    module: str
    help: str


COMMANDS: tuple[Command, ...] = (
    Command(
        name="demo",
        module="farskip.launch.demo",
        help="the whole conversion loop on this machine's CPU, in minutes",
    ),
    Command(name="pretrain", module="farskip.launch.pretrain", help="train a model from scratch, under any wiring"),
    Command(
        name="distill",
        module="farskip.launch.distill",
        help="rewire a pretrained model and repair it by self-distillation",
    ),
    Command(
        name="convert",
        module="farskip.launch.convert",
        help="rewrite the wiring of a checkpoint without loading it, file by file",
    ),
    Command(
        name="generate",
        module="farskip.launch.generate",
        help="print how a model continues a prompt, wired as its checkpoint says",
    ),
    Command(
        name="trace",
        module="farskip.launch.trace",
        help="measure in profiler traces how much communication was exposed",
    ),
    Command(
        name="simulate",
        module="farskip.launch.simulate",
        help="say what wirings and schedules would gain, before a run",
    ),
    Command(
        name="doctor",
        module="farskip.launch.doctor",
        help="say what would break a run here or keep it from overlapping",
    ),
    Command(
        name="bench",
        module="farskip.launch.bench",
        help="measure here: overlap over links that cost time, kernels on a GPU",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script.

    Args:
        argv: The words after `farskip`; None takes them from the command line.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"farskip {_version()}")
        return 0
    shadow = shadowing_checkout()
    if shadow is not None:
        print(
            f"farskip: the name triton_kernels finds {shadow}, a folder of a farskip checkout, instead of the package "
            "of that name, because the checkout is on sys.path; start `farskip` itself or set PYTHONSAFEPATH=1",
            file=sys.stderr,
        )
        return USER_MISTAKE
    return dispatch("farskip", COMMANDS, words)


def dispatch(program: str, commands: Sequence[Command], argv: Sequence[str]) -> int:
    """Calls the command that the first word names; a command that has commands of its own calls this again.

    Args:
        program: What stands before the first word, for messages ("farskip", "farskip bench").
        commands: The table.
        argv: The words after `program`.

    Returns:
        The command's exit code, or 2 for a word that is none and for a user error (`ValueError`, `RuntimeError`,
        `OSError`), which becomes one line.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text(program, commands), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else USER_MISTAKE
    command = next((command for command in commands if command.name == argv[0]), None)
    if command is None:
        print(f"{program}: {_unknown(argv[0], program, commands)}", file=sys.stderr)
        return USER_MISTAKE
    try:
        module = importlib.import_module(command.module)
        code = int(module.main(list(argv[1:])))
        # Here and not at exit, where a reader that is gone could no longer be handled.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{program} {command.name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except (NotImplementedError, RecursionError):
        raise
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            traceback.print_exc()
        print(f"{program} {command.name}: {one_line(error)}", file=sys.stderr)
        return USER_MISTAKE


def help_text(program: str, commands: Sequence[Command]) -> str:
    """The list of commands, as `--help` prints it."""
    width = max((len(command.name) for command in commands), default=0)
    lines = [f"usage: {program} COMMAND ...", ""]
    if program == "farskip":
        lines += ["Rewires the skip connections of transformers so that their collectives run under compute.", ""]
    lines += ["commands:", *(f"  {command.name:<{width}}  {command.help}" for command in commands), ""]
    lines.append(f"{program} COMMAND --help says more about one of them.")
    if program == "farskip":
        lines.append(f"farskip --version prints the version. {DEBUG_VARIABLE}=1 adds the traceback to an error.")
    return "\n".join(lines) + "\n"


def one_line(error: BaseException) -> str:
    """The error's message in one line; where it was not raised by us, with its type and how to see more."""
    message = " ".join(str(error).split()) or type(error).__name__
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    origin = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
    if origin.partition(".")[0] == "farskip" or isinstance(error, OSError):
        return message
    return f"{message} ({type(error).__name__} in {origin or 'unknown'}; {DEBUG_VARIABLE}=1 shows where)"


def shadowing_checkout() -> Path | None:
    """The folder that `import triton_kernels` would take from a checkout of this project, if it would.

    Note:
        Finds the module without importing it.
    """
    try:
        spec = importlib.util.find_spec("triton_kernels")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).resolve().parent
    ours = (folder.parent / "farskip" / "wiring.py").is_file() or folder.parent.name == "farskip"
    return folder if ours else None


def _unknown(word: str, program: str, commands: Sequence[Command]) -> str:
    near = difflib.get_close_matches(word, [command.name for command in commands], n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"{program} --help lists them"
    what = "option" if word.startswith("-") else "command"
    return f"there is no {what} {word!r}; {advice}"


def _version() -> str:
    try:
        return version("farskip")
    except PackageNotFoundError:
        return "(source tree, not installed)"
