"""Hydra commands: ``key=value`` overrides, multirun, and errors in one line.

A wrong override is refused before anything starts, with the key that is nearest to what was typed. ``--help`` lists
every key with its default and its meaning, read from the strings below the fields of the configuration classes.
"""

import ast
import difflib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

Config = TypeVar("Config")

_HYDRA_FLAGS = ("--multirun", "-m", "--cfg", "-c", "--package", "-p", "--info", "-i", "--resolve", "--hydra-help")


def run_hydra(
    command: str, config_class: type[Config], job: Callable[[Config], None], argv: list[str], *, intro: str
) -> int:
    """Compose the configuration of a command and run its job on it, once or, with ``--multirun``, for each combination.

    Args:
        command: name of the command and of its primary configuration in ``farskip.conf``.
        config_class: the structured configuration.
        job: called with an instance of it.
        argv: the words after the command.
        intro: text above the list of keys in ``--help``.

    Returns:
        Exit code 0.

    Raises:
        ValueError: an override that does not fit; names the nearest key.
    """
    if any(word in ("-h", "--help") for word in argv):
        _register(command, config_class)
        print(help_text(_compose(command, []), intro), end="")
        return 0
    unknown = [word for word in argv if word.startswith("-") and word.partition("=")[0] not in _HYDRA_FLAGS]
    if unknown:
        raise ValueError(f"there is no option {unknown[0]!r}; settings are given as key=value, --help lists them")
    _register(command, config_class)
    if not any(word.startswith("-") for word in argv):  # with a flag of its own, Hydra checks the overrides itself
        _check_overrides(command, config_class, argv)
    failures: list[BaseException] = []

    def hydra_job(composed: Any) -> None:
        from omegaconf import OmegaConf

        try:
            job(OmegaConf.to_object(composed))  # type: ignore[arg-type]
        except (ValueError, RuntimeError, OSError) as error:
            # Hydra would print its own account and end the process with 1; the caller turns this into one line.
            failures.append(error)

    _run_main(command, hydra_job, argv)
    if failures:
        raise failures[0]
    return 0


def help_text(config: Any, intro: str) -> str:
    """What ``farskip COMMAND --help`` prints, for the configuration that the command has without overrides."""
    lines = [intro.strip(), "", "settings (key=default):", ""]
    for key, default, doc in documented_keys(config):
        lines.append(f"  {key}={_shown(default)}")
        lines += textwrap.wrap(doc, 110, initial_indent="      ", subsequent_indent="      ")
    lines += [
        "",
        "A list is written [1,2], nothing is null, text with spaces needs quotes inside quotes: 'show.prompt=\"a b\"'.",
        "--multirun runs every combination of comma-separated values; --cfg job prints the resolved configuration.",
    ]
    return "\n".join(lines) + "\n"


def documented_keys(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, meaning) of every setting of a configuration.

    Raises:
        ValueError: a field without a string below it.
    """
    documented = _field_docs(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from documented_keys(value, f"{prefix}{field.name}.")
        elif field.name not in documented:
            raise ValueError(f"{type(config).__name__}.{field.name} is not documented: put a string below the field")
        else:
            yield f"{prefix}{field.name}", value, documented[field.name]


def _field_docs(config_class: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[statement.target.id] = " ".join(after.value.value.split())
    return found


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and (not value or "\n" in value or " " in value) else str(value)


def _register(command: str, config_class: type) -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=f"{command}_schema", node=config_class)


def _compose(command: str, overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("farskip.conf", version_base="1.3"):
            return OmegaConf.to_object(compose(command, overrides))
    finally:
        GlobalHydra.instance().clear()


def _check_overrides(command: str, config_class: type, overrides: list[str]) -> None:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        _compose(command, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, config_class, overrides)) from None


def _explain(error: BaseException, config_class: type, overrides: list[str]) -> str:
    """One line for a wrong override: the nearest key if the key is wrong, else what Hydra says of the value."""
    known = {key: type(default) for key, default, _ in documented_keys(config_class())}
    groups = {key.rsplit(".", 1)[0] for key in known if "." in key}
    free = [key for key, kind in known.items() if kind is dict]
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        is_known = key in known or key in groups or any(key.startswith(f"{name}.") for name in free)
        if "=" not in override:
            return f"{override!r} is no setting; write key=value"
        if not is_known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            return f"there is no setting {key!r}; " + (f"did you mean {near[0]!r}?" if near else "--help lists them")
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    return " ".join(str(root).split())


def _run_main(command: str, job: Callable[[Any], None], argv: list[str]) -> None:
    """Hydra's own entry reads sys.argv; give it ours, and keep it from writing folders and log files of its own."""
    import hydra

    previous = sys.argv
    quiet = [
        "hydra.run.dir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
        "hydra.sweep.dir=.",
        "hydra.sweep.subdir=.",
    ]
    sys.argv = [f"farskip {command}", *argv, *quiet]
    try:
        hydra.main(version_base="1.3", config_path="pkg://farskip.conf", config_name=command)(job)()
    finally:
        sys.argv = previous
