"""The package's habits: what imports what, how errors and docstrings are written, how long functions are."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import sida_ext

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sida_ext"
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))

# Statements of today's longest functions: none may grow beyond them, a new one has to stay below. When one is cut, its
# line goes.
LONGEST = 45
LONGER = {
    "sida_ext/cli.py:run": 60,
    "sida_ext/training/routing_curve.py:routing_curve": 51,
}

# Modules that nothing in the package imports, and why.
ENTRANCES = {
    "sida_ext.cli": "the command sida",
    "sida_ext.experts.metrics": "needs prometheus_client, which is an extra",
    "sida_ext.experts.source": "a protocol, for type checkers alone",
    "sida_ext.serving.request_router": "Ray imports it by its name",
}

# What can be imported from the package; a name that is lost breaks the programs of others.
NAMES = [
    "DecoderPredictor",
    "HashPredictor",
    "HashTable",
    "LayerStats",
    "Options",
    "Plan",
    "Predictor",
    "PredictorError",
    "RouterLookahead",
    "Runtime",
    "Stats",
    "StoreError",
    "SwitchTransformersForSequenceClassification",
    "TokenBatch",
    "TokenTablePredictor",
    "__version__",
    "batches_by_tokens",
    "from_pretrained",
    "get_precision",
    "pack",
    "plan",
    "precisions",
    "set_precision",
    "stream",
    "stream_by_tokens",
    "swap_experts",
]


@cache
def tree_of(module: Path) -> ast.Module:
    return ast.parse((ROOT / module).read_text(), str(module))


def dotted(module: Path) -> str:
    return ".".join(module.with_suffix("").parts).removesuffix(".__init__")


NAMED = {dotted(module): module for module in MODULES}


def imports_of(module: Path) -> set[str]:
    """Modules of the package that a module imports, ``sida_ext`` itself where a name is taken from its face."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "sida_ext"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sida_ext":
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.add(inner if inner in NAMED else str(node.module))
    return found


def functions(module: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(module)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of the body, inner functions included; a docstring is none."""
    count = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
    return count - (ast.get_docstring(function) is not None)


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml, checked over ``folder``/sida_ext."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_imports_run_downwards():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("experts/budget.py", "from sida_ext.serving import lookahead"),
        ("prediction/drift.py", "from sida_ext.experts import runtime"),
        ("files.py", "from sida_ext.experts import budget"),
        ("training/report.py", "from sida_ext.models import swap"),
    ],
)
def test_an_import_that_climbs_is_caught(tmp_path, module, line):
    shutil.copytree(PACKAGE, tmp_path / "sida_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "sida_ext" / module, "a") as file:
        file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_nothing_but_the_outermost_rooms_imports_the_face(module):
    allowed = {"sida_ext/cli.py", "sida_ext/_load.py"}  # _load takes the compiled extension from it
    if str(module) not in allowed and module.parts[1] != "planning":
        assert "sida_ext" not in imports_of(module)


def test_every_module_is_imported_by_another():
    imported = {target for module in MODULES for target in imports_of(module)}
    rooms = {dotted(module) for module in MODULES if module.name == "__init__.py"}
    assert set(NAMED) - imported - rooms <= set(ENTRANCES)


def test_no_public_name_is_lost():
    assert sorted([*sida_ext.__all__, "__version__"]) == sorted(NAMES)
    for name in NAMES:
        assert getattr(sida_ext, name) is not None
    assert set(NAMES) <= set(dir(sida_ext))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = sida_ext.nonsense


def test_the_type_checker_sees_the_same_names_in_the_same_places():
    given = {}
    for node in ast.walk(tree_of(Path("sida_ext/__init__.py"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sida_ext."):
            given |= {name.name: str(node.module).removeprefix("sida_ext.") for name in node.names}
    assert given == sida_ext._HOME_OF


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_errors_say_what_was_found_and_then_what_was_expected(module):
    """ "X is V, expected Y": one phrase, with a comma."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Raise):
            for text in ast.walk(node):
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    assert not re.search(r"[;:] expected\b|, but expected\b", text.value), f"{module}:{text.lineno}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_code_in_docstrings_stands_in_double_backticks(module):
    for node in ast.walk(tree_of(module)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False) or ""
            found = re.search(r"(?<![`:\w])`[^`\n]+`(?!`)", text)
            assert found is None, f"{module}: {found[0] if found else ''}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_no_function_grows(module):
    """Statements, as ruff's PLR0915 counts them; a ratchet, not a goal."""
    for function in functions(module):
        count = statements(function)
        limit = LONGER.get(f"{module}:{function.name}", LONGEST)
        assert count <= limit, f"{module}:{function.lineno} {function.name} has {count} statements, expected {limit}"


def test_the_list_of_long_functions_only_shrinks():
    """A function that was cut leaves it."""
    long = {f"{m}:{f.name}" for m in MODULES for f in functions(m) if statements(f) > LONGEST}
    assert set(LONGER) <= long


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_name_the_whole_path(module):
    assert all(node.level == 0 for node in ast.walk(tree_of(module)) if isinstance(node, ast.ImportFrom))
