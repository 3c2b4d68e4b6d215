"""The tables of docs/frameworks.md: each cell names a test."""

from __future__ import annotations

import ast
import re

import pytest
from frameworks import ROOT

PAGE = (ROOT / "docs" / "frameworks.md").read_text()
SECTIONS = [part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:] if "tests/test_integrations_" in part]
NAMES = [section.splitlines()[0] for section in SECTIONS]


def rows(section: str) -> list[list[str]]:
    """The cells of the section's table, without its heading."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def functions(source: str) -> set[str]:
    """The tests that a file defines."""
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


def test_every_framework_has_a_table():
    assert len(SECTIONS) == 10


@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_cells_name_tests(section):
    found = re.findall(r"`(tests/test_integrations_\w+\.py)`", section)
    source = "\n".join((ROOT / path).read_text() for path in found)
    known, words = functions(source), source + (ROOT / "tests" / "frameworks.py").read_text()
    assert rows(section)
    for feature, *cells in rows(section):
        for cell in cells:
            named = re.findall(r"`(test_\w+)(?:\[([^]]+)\])?`", cell)
            assert named, f"{feature}: {cell!r} names no test"
            for name, parameters in named:
                assert name in known, f"{found} have no {name}"
                for parameter in filter(None, re.split(r"(?<=sharded)-|(?<=replicated)-|(?<=owned)-", parameters)):
                    assert f'"{parameter}"' in words, f"{found} have no parameter {parameter!r}"
