"""Who may import whom, at the top of a file and inside functions, and who may touch the outside world."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("farskip", "models", "parallel", "triton_kernels", "launch", "conf")

MAY_IMPORT = {
    "triton_kernels": {"triton_kernels"},
    "farskip": {"farskip"},
    "parallel": {"parallel", "farskip", "triton_kernels"},
    "models": {"models", "parallel", "farskip", "triton_kernels"},
    "launch": {"launch", "models", "parallel", "farskip", "triton_kernels", "conf"},
    "conf": set(),
}
FACADE = "farskip/__init__.py"
"""Stands above the table: `import farskip` offers what the folders hold, and loads it when it is asked for."""

HEAVY = {"datasets", "hydra", "matplotlib", "megatron", "omegaconf", "tensorboard", "tokenizers", "transformers"}
"""Not at the top of a core module: whoever imports it would pay for them."""

OUTSIDE = {
    "farskip/testing_worker.py": {"init_process_group"},  # ranks of a test
}
"""Files outside launch/ that may do what only launch/ does, each with the reason."""

OUTSIDE_CALLS = {"init_process_group", "sys.argv", "os.environ", "os.getenv", "parse_args", "yaml"}


def files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Module name, line, and whether the import stands inside a function; modules named in a string included."""
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            # "from farskip import models" names a folder; "from farskip.wiring import Wiring" does not.
            names = [f"farskip.{alias.name}" for alias in node.names] if node.module == "farskip" else [node.module]
        elif (
            isinstance(node, ast.Call)
            and node.args
            and _name(node.func).rpartition(".")[2] in ("import_module", "__import__")
        ):
            first = node.args[0]
            names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        for name in names:
            yield name, getattr(node, "lineno", 0), id(node) in inside


def folder_of(module: str) -> str:
    """The folder that holds a module of ours."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in FOLDERS else "farskip"


def type_checking_lines(tree: ast.AST) -> set[int]:
    """Lines that only a type checker reads."""
    blocks = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and _name(node.test).endswith("TYPE_CHECKING")
    ]
    return {child.lineno for block in blocks for child in ast.walk(block) if isinstance(child, ast.stmt)}


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return ""


def forbidden_edges(file: str, tree: ast.Module) -> list[str]:
    """Imports of ours that the table does not allow; those for type checkers count too."""
    if file == FACADE:
        return []
    allowed = MAY_IMPORT[file.partition("/")[0]]
    found = []
    for name, line, _ in imported(tree):
        if name.partition(".")[0] == "farskip" and folder_of(name) not in allowed:
            found.append(f"{file}:{line} imports {name}")
    return found


def third_party_leaks(file: str, tree: ast.Module) -> list[str]:
    """Imports of others that do not belong where they stand."""
    folder, for_types = file.partition("/")[0], type_checking_lines(tree)
    found = []
    for name, line, inside in imported(tree):
        top = name.partition(".")[0]
        where = f"{file}:{line} imports {name}"
        if folder == "farskip" and top in HEAVY and not inside and line not in for_types:
            found.append(f"{where} at its top")
        if top in ("hydra", "omegaconf") and folder != "launch":
            found.append(f"{where} outside launch/")
        if top == "triton" and not (folder == "triton_kernels" and (file.endswith("_triton.py") or inside)):
            found.append(f"{where} outside triton_kernels/*_triton.py")
    return found


def outside_touches(file: str, tree: ast.Module) -> list[str]:
    """Reads of argv, environment or YAML, and starts of process groups, outside launch/."""
    if file.startswith("launch/"):
        return []
    found = []
    for node in ast.walk(tree):
        name = _name(node)
        last = name.rpartition(".")[2]
        touch = name if name in OUTSIDE_CALLS else last if last in ("init_process_group", "parse_args") else ""
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "sys", "yaml"):
            touch = next(
                (f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in OUTSIDE_CALLS), ""
            )
        if touch and touch not in OUTSIDE.get(file, set()):
            found.append(f"{file}:{getattr(node, 'lineno', 0)} uses {touch}")
    return found


@pytest.mark.parametrize("file", files())
def test_imports_follow_the_table(file: str) -> None:
    assert forbidden_edges(file, parse(file)) == []


@pytest.mark.parametrize("file", files())
def test_third_party_stays_where_it_belongs(file: str) -> None:
    assert third_party_leaks(file, parse(file)) == []


@pytest.mark.parametrize("file", files())
def test_only_launch_touches_the_outside(file: str) -> None:
    assert outside_touches(file, parse(file)) == []


@pytest.mark.parametrize("file", files())
def test_first_statement_says_what_the_file_is_for(file: str) -> None:
    assert ast.get_docstring(parse(file)), f"{file} has no docstring"


def test_nobody_imports_the_tests() -> None:
    for file in files():
        assert not [name for name, _, _ in imported(parse(file)) if name.partition(".")[0] == "tests"], file


def test_exceptions_are_still_needed() -> None:
    for file, touches in OUTSIDE.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        assert all(touch in source for touch in touches), file


@pytest.mark.parametrize("name", [folder for folder in FOLDERS if folder != "farskip"])
def test_no_folder_is_importable_under_its_bare_name(name: str) -> None:
    """Not from our checkout: `triton_kernels` may be installed as the other project's package."""
    for entry in sys.path:
        assert Path(entry or ".").resolve() != ROOT, "the checkout is on sys.path: run pytest, not python -m pytest"
        candidate = Path(entry or ".") / name
        assert not candidate.exists() or candidate.resolve() != ROOT / name


_PLANTED = [
    ("farskip/x.py", "import farskip.models.attach"),
    ("farskip/x.py", "def f():\n    from farskip.parallel.mesh import M"),
    ("farskip/x.py", "from farskip import models"),
    ("farskip/x.py", "import importlib\ndef f():\n    importlib.import_module('farskip.models.attach')"),
    ("farskip/x.py", "if TYPE_CHECKING:\n    from farskip.launch import main"),
    ("parallel/x.py", "async def f():\n    import farskip.models"),
    ("models/x.py", "from farskip.launch.main import COMMANDS"),
    ("triton_kernels/x.py", "from farskip.wiring import Wiring"),
    ("triton_kernels/x.py", "import farskip"),
    ("conf/__init__.py", "import farskip.wiring"),
]


@pytest.mark.parametrize(("file", "source"), _PLANTED)
def test_a_planted_edge_is_found(file: str, source: str) -> None:
    assert len(forbidden_edges(file, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("farskip/x.py", "import transformers", 1),
        ("farskip/x.py", "class A:\n    from datasets import Dataset", 1),
        ("farskip/x.py", "def f():\n    import transformers", 0),
        ("farskip/x.py", "if TYPE_CHECKING:\n    import transformers", 0),
        ("models/x.py", "import transformers", 0),
        ("models/x.py", "def f():\n    import omegaconf", 1),
        ("parallel/x.py", "def f():\n    import triton", 1),
        ("triton_kernels/x.py", "import triton", 1),
        ("triton_kernels/x_triton.py", "import triton.language as tl", 0),
    ],
)
def test_a_planted_leak_is_found(file: str, source: str, found: int) -> None:
    assert len(third_party_leaks(file, ast.parse(source))) == found


@pytest.mark.parametrize(
    "source",
    [
        "import os\nx = os.environ.get('A')",
        "from os import environ",
        "import os\nos.getenv('A')",
        "import sys\nsys.argv[1:]",
        "import torch.distributed as dist\ndef f():\n    dist.init_process_group('gloo')",
        "parser.parse_args()",
    ],
)
def test_a_planted_touch_is_found(source: str) -> None:
    assert len(outside_touches("farskip/x.py", ast.parse(source))) == 1
    assert outside_touches("launch/x.py", ast.parse(source)) == []
