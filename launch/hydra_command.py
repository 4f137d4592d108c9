"""Hydra commands: ``key=value`` overrides, every combination of several values, and errors in one line.

Composes with Hydra's grammar and configuration groups, but not with Hydra's own main function: that one writes files
into the working folder, reads sys.argv and prints errors of its own. Every override is looked at, and every
combination of a ``--multirun`` is composed, before the first job starts; what is wrong is refused with the key that is
nearest to what was typed. ``--help`` lists every key with its default and its meaning, read from the strings below the
fields of the configuration classes.
"""

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")

STOPPED = 143
"""Exit code of a run that was asked to stop (SIGTERM) and saved. With 0 a job script would go on as if it was done."""

_FLAGS = ("-h", "--help", "-m", "--multirun", "-c", "--cfg", "--resolve")


def run_hydra(
    command: str,
    config_class: type[Config],
    job: Callable[[Config], bool],
    argv: Sequence[str],
    *,
    intro: str,
    announce: Callable[[str], None] = print,
) -> int:
    """Compose the configuration of a command and run its job on it, once or, with ``--multirun``, for each combination.

    Args:
        command: name of the command and of its primary configuration in ``farskip.conf``.
        config_class: the structured configuration.
        job: called with an instance of it; False when it was asked to stop, which ends a multirun, too.
        argv: the words after the command.
        intro: text above the list of keys in ``--help``.
        announce: called with one line per combination of a multirun.

    Returns:
        The exit code: 0, or `STOPPED`.

    Raises:
        ValueError: an override that does not fit; names the nearest key.
    """
    words = _Words.sorted_from(argv)
    with _hydra(command, config_class) as compose:
        if words.help:
            print(help_text(compose([]), intro), end="")
            return 0
        known = _KnownKeys.of(config_class, compose)
        checked = [known.checked(override) for override in words.overrides]
        combinations = [[known.as_text(word) for word in each] for each in _combinations(checked, words.multirun)]
        configs = [_composed(compose, known, overrides) for overrides in combinations]
    if words.show:
        print("---\n".join(_yaml(config) for config in configs), end="")
        return 0
    _refuse_shared_folder(configs)
    for number, (overrides, config) in enumerate(zip(combinations, configs, strict=True), start=1):
        if words.multirun:
            swept = [word.lstrip("+") for word in overrides if any(word not in other for other in combinations)]
            announce(f"== {number} of {len(configs)}: {' '.join(swept)}")
        if not job(config):
            return STOPPED
    return 0


def help_text(config: Any, intro: str) -> str:
    """What ``farskip COMMAND --help`` prints, for the configuration that the command has without overrides."""
    lines = [intro.strip(), "", "settings (key=default):", ""]
    for key, default, doc in documented_keys(config):
        lines += textwrap.wrap(
            f"{key}={_shown(default)}", 116, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
        lines += textwrap.wrap(doc, 110, initial_indent="      ", subsequent_indent="      ")
    key, _, example = _place(config)
    lines += [
        "",
        f"A list is written [1,2], nothing is null, text with spaces needs quotes inside quotes: '{key}=\"a b\"'.",
        "--multirun runs every combination of comma-separated values, each in a place of its own:",
        f"  --multirun {example}",
        "--cfg job prints the resolved configuration and runs nothing.",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Words:
    """What was typed after the command."""

    overrides: tuple[str, ...]
    help: bool
    multirun: bool
    show: bool

    @staticmethod
    def sorted_from(argv: Sequence[str]) -> "_Words":
        flags, overrides = set(), []
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if word in ("-c", "--cfg"):
                word = f"--cfg={rest.pop(0) if rest else ''}"
            if word.startswith("--cfg=") and word != "--cfg=job":
                raise ValueError(f"{word.replace('=', ' ')!r} is not known; --cfg job prints the configuration")
            if not word.startswith("-"):
                overrides.append(word)
            elif word.partition("=")[0] in _FLAGS:
                flags.add(word)
            else:
                near = difflib.get_close_matches(word, _FLAGS, n=1, cutoff=0.7)
                advice = f"did you mean {near[0]!r}?" if near else "settings are given as key=value, --help lists them"
                raise ValueError(f"there is no option {word!r}; {advice}")
        return _Words(
            overrides=tuple(overrides),
            help=bool(flags & {"-h", "--help"}),
            multirun=bool(flags & {"-m", "--multirun"}),
            show="--cfg=job" in flags,
        )


Compose = Callable[[Sequence[str]], Any]


@contextmanager
def _hydra(command: str, config_class: type) -> Iterator[Compose]:
    """Hydra, initialized for the time of the block: a function from overrides to an instance of the configuration."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name=f"{command}_schema", node=config_class)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("farskip.conf", version_base="1.3"):
            yield lambda overrides: OmegaConf.to_object(compose(command, list(overrides)))
    finally:
        GlobalHydra.instance().clear()


@dataclass(frozen=True, kw_only=True, slots=True)
class _KnownKeys:
    """The keys of a command, for the check of what was typed.

    Attributes:
        defaults: dotted key -> default.
        groups: a section that is chosen by name, as model=demo -> its names.
    """

    defaults: dict[str, Any]
    groups: dict[str, list[str]]

    @staticmethod
    def of(config_class: type, compose: Compose) -> "_KnownKeys":
        from hydra.core.global_hydra import GlobalHydra

        loader = GlobalHydra.instance().config_loader()
        sections = {field.name: loader.get_group_options(field.name) for field in fields(config_class)}
        return _KnownKeys(
            defaults={key: default for key, default, _ in documented_keys(compose([]))},
            groups={section: names for section, names in sections.items() if names},
        )

    def checked(self, override: str) -> str:
        """The override, with a ``+`` where a key may be new; ``+`` is not needed elsewhere, and dropped.

        Raises:
            ValueError: no value, or no such key.
        """
        typed, equals, value = override.partition("=")
        key = typed.lstrip("+~")
        is_free = any(type(default) is dict and key.startswith(f"{name}.") for name, default in self.defaults.items())
        if not (key in self.defaults or key in self.groups or is_free):
            raise ValueError(self._unknown(key, has_value=bool(equals)))
        if typed.startswith("~"):
            raise ValueError(f"{override!r}: a setting cannot be taken away; give it another value, null is nothing")
        if not equals:
            raise ValueError(f"{override!r} has no value; write {key}=value")
        if value.startswith("~/"):  # no shell expands it after a dotted key, and Hydra's grammar has no place for it
            value = f"'{Path(value).expanduser()}'"
        return f"{'++' if is_free else ''}{key}={value}"

    def as_text(self, override: str) -> str:
        """A list of numbers is text where the setting is: wiring.layers=[0,2] means wiring.layers='[0,2]'."""
        key, _, value = override.partition("=")
        is_list = isinstance(self.defaults.get(key), str) and re.fullmatch(r"\[[\d\s,]*\]", value)
        return f"{key}='{value}'" if is_list else override

    def _unknown(self, key: str, *, has_value: bool) -> str:
        below = [known for known in self.defaults if known.startswith(f"{key}.")]
        if below:
            return f"{key!r} is a group of settings; give one of them, as {below[0]}=value"
        same_end = [known for known in self.defaults if known.endswith(f".{key}")]
        near = same_end or difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]!r}?" if near else "--help lists them"
        return f"there is no setting {key!r}; {advice}" if has_value else f"{key!r} is no setting; write key=value"

    def explain(self, error: BaseException, overrides: Sequence[str]) -> str:
        """One line for a value that does not fit."""
        for override in overrides:
            key, _, value = override.partition("=")
            if key in self.groups and value not in self.groups[key]:
                return f"there is no {key}={value}; choose {' or '.join(self.groups[key])}"
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = str(root).strip().partition("\n")[0].rstrip(".")
        where = getattr(root, "full_key", None)
        if not where:
            return reason
        example = f"; the default is {where}={_shown(self.defaults[where])}" if where in self.defaults else ""
        return f"{where}: {reason}{example}"


def _combinations(overrides: Sequence[str], multirun: bool) -> list[list[str]]:
    """Every combination of the values; one without ``--multirun``."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{override.lstrip('+')}: {reason}; special characters need quotes inside quotes, as 'key=\"a b\"'"
            ) from None
        if parsed[-1].is_sweep_override() and not multirun:
            key, _, value = override.lstrip("+").partition("=")
            raise ValueError(
                f"{key}={value} has several values: --multirun runs each, a list is written {key}=[{value}], "
                "and text with a comma needs quotes inside quotes"
            )
    try:
        return BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException as error:
        raise ValueError(" ".join(str(error).split())) from None


def _composed(compose: Compose, known: _KnownKeys, overrides: Sequence[str]) -> Any:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(known.explain(error, overrides)) from None


def _refuse_shared_folder(configs: Sequence[Any]) -> None:
    """Two runs of a multirun must not write to one place: the run folder, or the result file of a benchmark."""
    seen = set()
    for config in configs:
        key, place, example = _place(config)
        if place and place in seen:
            raise ValueError(
                f"--multirun: two combinations write to {key}={place}; name it by what differs, e.g. {example}"
            )
        seen.add(place)


def _place(config: Any) -> tuple[str, str, str]:
    """Where a command writes: the key, its value, and words of a multirun that give each combination its own."""
    if hasattr(config, "run"):
        return "run.folder", config.run.folder, "wiring.name=farskip,ladder 'run.folder=runs/${wiring.name}'"
    return "out", config.out, "link=local,emulated 'out=${link}.json'"


def _yaml(config: Any) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
