"""The documents are true of the code: programs run as they stand, links and paths lead somewhere, words are the
glossary's."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
from pathlib import Path

import pytest
import torch.distributed as dist
from workers import WorkerPool

import compress
import dear
import precondition
from dear._ports import free_port

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("**/*.md")})
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
SOURCES = (".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".inc")
# Words for which the glossary has another.
FORBIDDEN = r"\b(duels?|crews?|judges?|judged|mend(s|ed|ing)?|relays?|tickets?|stand-ins?|kept results?)\b"


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(place), f"{page.name} links to {target}, and {place.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_named_in_a_page_exist(page):
    """`csrc/schedule`, `tests/test_parity.py` and their like, in prose."""
    for path in re.findall(
        r"`((?:\.ci|benchmarks|compress|csrc|dear|docs|examples|precondition|tests)/[\w./*-]*)`", prose(page)
    ):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name} names {path}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_words_are_the_glossarys(page):
    found = re.search(FORBIDDEN, prose(page), re.IGNORECASE)
    assert found is None, f"{page.name} says {found[0]!r}: docs/glossary.md has another word"


def test_words_of_the_sources_are_the_glossarys():
    folders = ("dear", "compress", "precondition", "csrc", "benchmarks", "tests", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).glob("**/*") if path.suffix in SOURCES]
    assert len(sources) > 200
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in sources
        if path != Path(__file__).resolve() and (match := re.search(FORBIDDEN, path.read_text(), re.IGNORECASE))
    }
    assert not found, f"docs/glossary.md has other words: {found}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_glossary_has_each_word_once():
    terms = re.findall(r"^([a-z].*)\n:   ", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    words = [word.strip() for term in terms for word in term.split(",")]
    assert len(words) > 30
    assert sorted(words) == sorted(set(words))


@pytest.mark.parametrize("package", [dear, compress, precondition], ids=["dear", "compress", "precondition"])
def test_api_has_every_public_name(package):
    page = (DOCS / "api" / f"{package.__name__}.md").read_text()
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    missing = {name for name in package.__all__ if not name.startswith("_")} - shown
    assert not missing, f"docs/api/{package.__name__}.md lacks {sorted(missing)}"


def test_api_has_every_public_member_of_an_engine():
    page = (DOCS / "api" / "dear.md").read_text()
    members = page.partition("::: dear.Engine\n")[2].partition(":::")[0]
    public = {name for name in vars(dear.Engine) if not name.startswith("_")}
    assert set(re.findall(r"- (\w+)$", members, re.MULTILINE)) == public


def test_navigation_has_every_page():
    config = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/-]+\.md", config[config.index("nav:") : config.index("theme:")]))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.glob("**/*.md")}


def run_script(rank: int, world: int, script: str, port: int) -> str:
    """Runs a script as torchrun would start it here; returns what it prints."""
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(script, run_name="__main__")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
    return printed.getvalue()


def run_two(pool: WorkerPool, script: Path) -> str:
    """What rank 0 of two prints."""
    return pool.run(run_script, str(script), free_port(), backend=None)[0]


def test_readmes_script_runs(pool2, tmp_path):
    block = re.search(r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    script = tmp_path / "train.py"
    script.write_text(block[1])
    run_two(pool2, script)


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss ([\d.]+)", output)]


def test_training_example_runs(pool2):
    found = losses(run_two(pool2, ROOT / "examples" / "train.py"))
    assert len(found) == 4
    assert found[-1] < 0.9 * found[0]


def test_own_compressor_runs(pool2):
    output = run_two(pool2, ROOT / "examples" / "own_compressor.py")
    assert losses(output)[0] < 2.1  # 2.3 is what ten classes cost before training
    assert "sent 0.10 of a dense step" in output


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_blocks_are_python(page):
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_included_files_exist(page):
    """Where a page takes in a file or a section of one: spaced out by a formatter, the marker itself would be shown."""
    for line in re.findall(r"^.*8 ?<.*$", page.read_text(), re.MULTILINE):
        found = re.fullmatch(r'--8<-- "([\w./-]+)(?::(\w+))?"', line)
        assert found is not None, f"{page.name} has {line!r}, which includes nothing"
        text = (ROOT / found[1]).read_text()
        assert found[2] is None or f"[start:{found[2]}]" in text
