"""The results pages and README's table say what the raw results say, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import __main__ as command
from benchmarks.report import docs, markdown, steps

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
AGAIN = "run make results, and commit what it writes"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return docs.pages(RESULTS)


def test_the_committed_pages_are_those_of_the_committed_results(pages: dict[str, str]) -> None:
    committed = {path.name: path.read_text() for path in (ROOT / "docs" / "results").glob("*.md")}
    assert committed.keys() == pages.keys(), AGAIN
    for name, text in pages.items():
        assert committed[name] == text, f"docs/results/{name} differs from the raw results: {AGAIN}"
    assert all((ROOT / "docs" / name).exists() for name in docs.PICTURES)


def test_readme_has_the_table_of_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert docs.with_table(readme, docs.readme_table(RESULTS)) == readme, AGAIN


def test_another_time_or_loss_in_a_file_is_another_number_on_its_page(tmp_path: Path, pages: dict[str, str]) -> None:
    results = Path(shutil.copytree(RESULTS, tmp_path / "results"))

    def change(name: str, change: Callable[[dict[str, Any]], None]) -> None:
        payload = json.loads((results / name).read_text())
        change(payload)
        (results / name).write_text(json.dumps(payload))

    def slower(payload: dict[str, Any]) -> None:
        (acp,) = (one for one in payload["cells"][0]["strategies"] if one["name"] == "acp:4")
        for block in acp["blocks"]:
            block["ms"] = [[2 * ms for ms in rank] for rank in block["ms"]]

    def worse(payload: dict[str, Any]) -> None:
        for cell in payload["cells"]:
            if cell["plan"]["strategy"] == "bf16":
                cell["held_out"][-1][1] *= 1.5

    def quicker(payload: dict[str, Any]) -> None:
        payload["cells"][0]["kernels"][0]["median_s"] /= 2

    change("training-compressed-4w-1gbit.json", slower)
    change("convergence-rank4.json", worse)
    change("compressors-h100.json", quicker)
    differ = {}
    for name, text in docs.pages(results).items():
        differ[name] = [line for line in text.splitlines() if line not in pages[name].splitlines()]
    own, apart = (line for line in differ["steps.md"] if line.startswith(("| 4 workers, 1 Gbit/s | comp", "|  |")))
    assert "| 1081 (0.93×) |" in own and "–1081 (0.93–" in apart
    assert any("| bf16 |" in line and "**1.500×**" in line for line in differ["losses.md"])
    assert "| 200% | 12.9× (6.4×) |" in differ["kernels.md"][0] and len(differ["kernels.md"]) == 1
    assert differ["index.md"] and not differ["collectives.md"] and not differ["gpu.md"]


def test_runs_of_one_cell_are_all_there_with_their_spread(pages: dict[str, str]) -> None:
    lines = [line.split(" | ") for line in pages["steps.md"].splitlines()]
    head = next(line for line in lines if "ACP-SGD, rank 4" in line)
    first = next(
        number for number, line in enumerate(lines) if line[0] == "| 4 workers, 1 Gbit/s" and len(line) == len(head)
    )
    last = next(number for number in range(first, len(lines)) if "from – to" in lines[number][1])
    acp = {line[1].split(",")[0]: line[head.index("ACP-SGD, rank 4")].strip("*") for line in lines[first:last]}
    assert acp["compressed-4w-1gbit"] == "541 (1.85×)" and acp["4w-1gbit"] == "930 (1.32×)"
    known = [re.fullmatch(r"(\d+) \((.*)×\)", cell) for cell in acp.values() if cell]
    ms, ratios = ([float(found[part]) for found in known if found] for part in (1, 2))
    spread = f"{min(ms):.0f}–{max(ms):.0f} ({min(ratios):.2f}–{max(ratios):.2f}×)"
    assert len(known) >= 3 and lines[last][head.index("ACP-SGD, rank 4")] == f"*{spread}*"


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("# x", docs.BEGIN, docs.END + docs.BEGIN):
        with pytest.raises(docs.MarkersMissing, match=r"README\.md has no place"):
            docs.with_table(text, "| a |")
    assert docs.with_table(f"a\n{docs.BEGIN}\nold\n{docs.END}\nz", "| a |") == f"a\n{docs.BEGIN}\n| a |\n{docs.END}\nz"
    (tmp_path / "README.md").write_text("# x")
    for more, says in ([], "README.md has no place"), (["--results", str(tmp_path)], "holds no results"):
        with pytest.raises(SystemExit):
            command.main(["--docs", str(tmp_path / "docs"), *more])
        assert says in capsys.readouterr().err
    assert not list((tmp_path / "docs" / "results").glob("*.md"))


def test_numbers_and_extents() -> None:
    assert [markdown.number(one) for one in (None, 3.14159, 99.96, 541.3)] == ["", "3.14", "100", "541"]
    assert markdown.extent([]) == markdown.extent([None]) == ""
    assert markdown.extent([2.0, None, 1.0], ".1f", "×") == "1.0–2.0×" and markdown.extent([3.0]) == "3"
    assert markdown.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert [steps._label(name) for name in ("dear+acp:4", "sign")] == ["DeAR + ACP-SGD rank 4", "EF-SignSGD"]
    assert str(steps.Took("acp:4", 541.3, 1.849)) == "541 (1.85×)" and str(steps.Took("ddp:4", 942.0, None)) == "942"
