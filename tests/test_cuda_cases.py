"""The cases that tests/test_cuda*.py run on a GPU, without one: each can be called, and is run by the command."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from benchmarks.gpu.tasks import tasks

TESTS = sorted(Path(__file__).parent.glob("test_cuda*.py"))
FILES = [path.stem for path in TESTS if "pytestmark = on_gpu.NEEDED" in path.read_text().splitlines()]


@pytest.mark.parametrize("name", FILES)
def test_every_case_can_be_called(name: str) -> None:
    module = importlib.import_module(name)
    cases = [case for list_ in ("CASES", "CASES_OF_FOUR") for case in getattr(module, list_, [])]
    assert cases
    for function, arguments in cases:
        inspect.signature(function).bind(0, 2, *arguments)


def test_the_command_runs_every_file() -> None:
    given = {word for task in tasks(dry_run=False) if task.tests for word in task.arguments}
    assert {f"tests/{name}.py" for name in FILES} <= given
