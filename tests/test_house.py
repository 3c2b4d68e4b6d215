"""How the sources hang together: imports run one way, files and classes stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dear", "compress", "precondition", "planner", "benchmarks")
MOST_LINES = 400
MOST_METHODS = 25


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """The modules of the packages by name; a stub stands for a compiled module."""
    paths = [path for package in packages for kind in ("*.py", "*.pyi") for path in (root / package).rglob(kind)]
    return {module_of(path, root): path for path in paths}


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """What the module imports of ``known``, wherever in it: under TYPE_CHECKING and in functions too."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            wanted = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in wanted:  # from a.b import c: the module a.b.c if there is one, else a.b
            target = full if full in known else full.rpartition(".")[0]
            if target in known and target != name:
                yield target


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    return {name: set(imported(name, path, known)) for name, path in known.items()}


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a ring, the first one repeated at the end."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])[::-1]
    return None


def test_imports_run_one_way():
    graph = imports(modules())
    assert "dear._C" in graph["dear.engine"] | graph["dear._sharded"], "the search finds no imports"
    found = circle(graph)
    assert found is None, " imports ".join(found)


def test_a_circle_is_found(tmp_path):
    files = {
        "a/__init__.py": "",
        "a/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import two\n",
        "a/two.py": "def later():\n    from . import three\n",
        "a/three.py": "import a.one\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = circle(imports(modules(tmp_path, ("a",))))
    assert found is not None and set(found) == {"a.one", "a.two", "a.three"}
    ring = dict(pairwise(found))
    assert ring == {"a.one": "a.two", "a.two": "a.three", "a.three": "a.one"}, "each imports the next"


@pytest.mark.parametrize(
    ("package", "foreign"),
    [
        ("dear", ("compress", "precondition", "planner", "benchmarks")),
        ("compress", ("precondition", "planner", "benchmarks")),
        ("precondition", ("compress", "planner", "benchmarks")),
        ("planner", ("benchmarks",)),
    ],
)
def test_lower_packages_do_not_know_higher_ones(package, foreign):
    for name, targets in imports(modules()).items():
        if name.split(".")[0] == package:
            assert not [target for target in targets if target.split(".")[0] in foreign], name


def sources(*suffixes: str) -> list[Path]:
    folders = [*PACKAGES, "csrc", "tests", "examples", "tools"]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert found
    return [*found, ROOT / "setup.py"]


def test_files_stay_small():
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sources(".py", ".cpp", ".h", ".cu", ".cuh")
    }
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_classes_stay_small():
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.ClassDef):
                functions = {f.name for f in node.body if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)}
                assert len(functions) <= MOST_METHODS, f"{path.name}: {node.name} has {len(functions)} methods"
