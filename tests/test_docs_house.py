"""What is written in two places says the same: packages, versions, tools, linters."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
tomllib = pytest.importorskip("tomllib")  # Python 3.11 on
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def rule(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    found = re.search(rf"^{re.escape(target)}:[^\n]*\n((?:\t[^\n]*\n)+)", MAKEFILE, re.MULTILINE)
    assert found is not None
    return [line.strip() for line in found[1].splitlines()]


def bare(requirement: str) -> str:
    """The package of a requirement: "mkdocs<2" is mkdocs."""
    return re.split(r"[\[<>=!~; ]", requirement.strip("\"'"))[0].lower()


#: It imports the planner under the name of its folder, and reads the raw results: it works in the repository alone.
NOT_INSTALLED = {"dear_benchmarks.predicted"}


def test_packages_are_the_folders():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    folders = {"dear", "compress", "precondition"}
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        for init in (ROOT / folder).glob("**/__init__.py"):
            folders.add(".".join((package, *init.parent.relative_to(ROOT / folder).parts)))
    for package in ("dear", "compress", "precondition"):
        for init in (ROOT / package).glob("*/**/__init__.py"):
            folders.add(".".join(init.parent.relative_to(ROOT).parts))
    assert sorted(listed) == sorted(folders - NOT_INSTALLED)


def test_packages_are_typed():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for package in ("dear", "compress", "precondition"):
        assert (ROOT / package / "py.typed").exists()
        assert "py.typed" in data[package]


def test_makefile_installs_what_the_extras_list():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = {bare(one) for group in extras.values() for one in group} - {"dear-torch"}
    installed = {
        bare(word)
        for target in ("$(VENV)/.installed", "$(VENV)/.frameworks")
        for line in rule(target)
        if "pip install" in line
        for word in line.split("#")[0].split()
    }
    assert wanted <= installed


def test_pre_commit_runs_the_linters_of_make_lint():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: \.venv/bin/(.+)", config)
    for command in rule("lint"):
        if command.startswith("$(BIN)/"):
            tool = re.sub(r"\$\((NATIVE|TESTED)\)", "", command.removeprefix("$(BIN)/")).strip()
            assert tool in entries, f"make lint runs {tool}, and .pre-commit-config.yaml does not"


def test_version_is_read_and_not_repeated():
    version = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert version == "dear._version.__version__" and "version" in PROJECT["project"]["dynamic"]
    text = (ROOT / "dear" / "_version.py").read_text()
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', text, re.MULTILINE)


def test_every_target_has_a_line_of_help():
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.+)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    told = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make (\S+) +\S", told, re.MULTILINE)) == set(phony[1].replace("\\\n", " ").split())


def test_the_loop_over_torch_versions_spans_what_the_project_asks_for():
    script = (ROOT / ".ci" / "torch-matrix").read_text()
    listed = re.search(r"versions=\((\d[^)]*)\)", script)
    assert listed is not None
    torch = next(one for one in PROJECT["project"]["dependencies"] if bare(one) == "torch")
    low, high = re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", torch).groups()
    assert listed[1].split() == [f"2.{minor}.0" for minor in range(int(low), int(high))]


def test_docstrings_become_markdown():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        to_markdown = pytest.importorskip("_docstrings").to_markdown
    finally:
        sys.path.pop(0)
    assert to_markdown("See :class:`compress.Group`::") == "See `compress.Group`:"
    assert to_markdown("a\n\n====  ====\nx     y\n====  ====\n\nb").split("\n\n")[1].startswith("```text\n")
