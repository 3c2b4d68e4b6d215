"""The report: who wins, what it says and where it says it comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import canned
import pytest
import reported

from benchmarks import drawing, records
from benchmarks.report import __main__ as command
from benchmarks.report import choosing, comparison, repeats, winners
from benchmarks.report.evidence import Evidence


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are laid out and not rendered, which takes most of the time."""
    monkeypatch.setattr(drawing, "save", lambda figure, path, about: (path.touch(), drawing.plt.close(figure)))


def page(folder: Path, **payloads: dict[str, Any]) -> str:
    """The report of these results, all on one line."""
    command.main([*map(str, reported.write(folder, **payloads)), "--out", str(folder / "out")])
    return " ".join((folder / "out" / "report.md").read_text().split())


def cell(**more: Any) -> comparison.Cell:
    payload = reported.training(**more)
    return comparison.cells([records.Source("t.json", "training", payload)])[0]


def everyone(_: comparison.Cell, __: str) -> bool:
    return True


# Who competes with whom


@pytest.mark.parametrize(
    ("name", "family", "kind"),
    [
        ("ddp", comparison.DDP, "ddp"),
        ("ddp:4", comparison.DDP, "ddp"),
        ("ddp:16", comparison.DDP, "ddp"),
        ("fsdp2", comparison.DDP, "fsdp2"),
        ("ddp+fp16:2", comparison.DDP_HALF, "ddp+fp16"),
        ("fsdp2+bf16", comparison.DDP_HALF, "fsdp2+bf16"),
        ("ddp+powersgd:8", comparison.DDP_POWER, "ddp+powersgd:8"),
        ("dear", comparison.DEAR, "dear"),
        ("dear:replicated:4", comparison.DEAR, "dear:replicated"),
        ("bf16:4", comparison.HALF, "bf16"),
        ("dear+fp16", comparison.HALF, "dear+fp16"),
        ("acp:8:2", comparison.COMPRESSED, "acp:8"),
        ("dear+topk:0.01", comparison.COMPRESSED, "dear+topk:0.01"),
        ("sign:majority:4", comparison.COMPRESSED, "sign:majority"),
        ("local:4:4", comparison.COMPRESSED, "local:4"),
        ("dear+fast:start=0", comparison.COMPRESSED, "dear+fast:start=0"),
        ("safe", comparison.COMPRESSED, "safe"),
        ("exact", comparison.HALF, "exact"),
        ("auto", comparison.DEAR, "auto"),
        ("planned:ddp:4", comparison.DEAR, "planned:ddp"),
        ("unheard:of", comparison.DDP, "unheard:of"),  # results of another version: a rival, so that it flatters nobody
    ],
)
def test_families_and_kinds(name: str, family: comparison.Family, kind: str) -> None:
    assert comparison.family(name) is family
    assert comparison.kind(name) == kind


def test_the_best_of_ours_meets_the_best_rival() -> None:
    compared = comparison.compare(cell(), everyone)
    assert compared and (compared.winner, compared.ours, compared.rival) == ("acp:4", "acp:4", "ddp+fp16:4")
    assert compared.ratio == pytest.approx(160 / 125) and not compared.tie
    exact = comparison.compare(cell(), lambda _, name: comparison.is_exact(name))
    assert exact and (exact.winner, exact.rival) == ("dear:sharded", "ddp:1") and exact.ratio == pytest.approx(1.25)


def test_a_lost_cell_is_a_lost_cell() -> None:
    compared = comparison.compare(cell(steps={**reported.STEPS, "ddp:25": 120.0}), everyone)
    assert compared and compared.winner == "ddp:25" and compared.ratio == pytest.approx(120 / 125)


def test_what_auto_chose_stands_beside_the_best_of_the_sweep() -> None:
    plain = cell()
    assert not choosing.has_chosen([plain]) and "| link |" in choosing.chosen_table([plain])
    made = canned.training_cell()
    chosen = {"update": "replicated", "compressor": None, "bucket_cap_mb": 2.6}
    made["strategies"].append(canned.strategy("auto", [[189.0, 189.0], [379.0, 379.0]], chosen=chosen))
    made["strategies"].append(canned.strategy("acp:4", [[99.0, 99.0], [99.0, 99.0]]))
    made["plan"] |= {"workload": "gpt", "batch": 4}
    ours = comparison.as_cell(plain.source, made)
    assert comparison.family("auto") is comparison.DEAR, "it is this library's, and exact"
    row = choosing.chosen_table([ours]).splitlines()[-1]
    assert "| 350 (ddp:1) | 300 (dear:sharded) | 285 |" in row, "a compressor is no rival of exact training"
    assert "| 1.053× (1.05–1.05) |" in row and row.endswith("| replicated, 2.6 MiB |")


def test_what_settled_auto_adds_stands_beside_the_same_by_hand() -> None:
    plain = cell()
    assert not choosing.has_settled([plain])
    made = canned.training_cell()
    made["plan"] |= {"workload": "gpt", "batch": 4}
    for name, times in {"dear:sharded:2.6": [200.0, 400.0], "planned:sharded:2.6": [201.0, 404.0]}.items():
        made["strategies"].append(canned.strategy(name, [[each, each] for each in times]))
    made["strategies"].append(canned.strategy("planned:ddp:8", [[1.0, 1.0], [1.0, 1.0]]))
    ours = comparison.as_cell(plain.source, made)
    assert choosing.has_settled([ours])
    (row,) = choosing.settled_table([ours]).splitlines()[2:]
    assert "| planned:sharded:2.6 |" in row and row.endswith("| 2 | +0.75% (+0.6–+0.9) |")
    made["strategies"].append(canned.strategy("auto", [[1.0, 1.0], [1.0, 1.0]]))
    ours = comparison.as_cell(plain.source, made)
    assert "planned" not in choosing.chosen_table([ours]), "it is no rival of the sweep"


def test_rounds_that_disagree_are_a_tie() -> None:
    both = cell(steps={"ddp:1": 100.0, "dear:sharded": 100.0})
    both.strategy("dear:sharded")["blocks"][0]["ms"] = [[90.0], [90.0]]
    both.strategy("dear:sharded")["blocks"][1]["ms"] = [[215.0], [215.0]]
    compared = comparison.compare(both, everyone)
    assert compared and compared.tie


def test_one_side_alone_wins_without_a_ratio() -> None:
    compared = comparison.compare(cell(steps={"none": 90.0, "dear:sharded": 100.0}), everyone)
    assert compared and (compared.winner, compared.rival, compared.ratio) == ("dear:sharded", None, None)
    assert comparison.compare(cell(steps={"none": 90.0}), everyone) is None


def test_of_two_measurements_the_fuller_then_the_newer_counts() -> None:
    full = records.Source("full.json", "training", reported.training(when="2026-01-01"))
    newer = records.Source("newer.json", "training", reported.training(when="2026-01-02"))
    fewer = records.Source("few.json", "training", reported.training(when="2026-01-03", steps={"ddp:1": 1.0}))
    (kept,) = comparison.chosen(comparison.cells([full, newer, fewer])).values()
    assert kept.source is newer
    for one in newer.cells[0]["strategies"]:
        one["breakdown"] = None  # a repeat without it must not take the bars by phase from the report
    (kept,) = comparison.chosen(comparison.cells([full, newer, fewer])).values()
    assert kept.source is full


@pytest.mark.usefixtures("quick_pictures")
def test_machines_have_rows_and_pictures_of_their_own(tmp_path: Path) -> None:
    other = reported.training(machine={"cpu": "Slide Rule", "cores": 1})
    made = page(tmp_path, one=reported.training(), two=other)
    pictures = sorted(path.stem for path in (tmp_path / "out").glob("step-parts-*"))
    assert len(pictures) == 2 and pictures[1].endswith("-Slide_Rule_1_cores")
    assert "two.json: Slide Rule, 1 cores" in made
    assert "measured twice" not in made


# The map


def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *results: dict[str, Any]) -> dict[str, list[Any]]:
    """What the map's cells show, by rate: a compared or None for each panel."""
    shown: dict[str, list[Any]] = {}

    def note(_: Any, column: int, __: int, compared: Any, *___: Any) -> None:
        shown.setdefault(winners.RATES[column], []).append(compared)

    monkeypatch.setattr(winners, "_one", note)
    read = [records.Source(f"{number}.json", one["benchmark"], one) for number, one in enumerate(results)]
    evidence = Evidence.of(read)
    everything = winners.Map("all", lambda cell, name: not evidence.is_barred(name, cell.setting), lambda *_: False)
    winners.draw(evidence.chosen, [everything], [], tmp_path / "map.png")
    return shown


@pytest.mark.usefixtures("quick_pictures")
def test_what_was_not_measured_stays_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = drawn(monkeypatch, tmp_path, reported.training("500mbit"))
    assert [rate for rate, found in shown.items() if found != [None]] == ["500mbit"]
    assert list(shown) == list(winners.RATES)


def test_an_empty_cell_is_hatched_and_a_lost_one_framed(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_rgba

    figure, axes = plt.subplots()
    winners._one(axes, 0, 0, None)
    assert [patch.get_hatch() for patch in axes.patches] == ["////"] and not axes.texts
    winners._one(axes, 1, 0, comparison.Compared("ddp:1", "dear", "ddp:1", 0.9, (0.88, 0.92)))
    assert to_rgba(winners.LOST) in [patch.get_edgecolor() for patch in axes.patches]
    assert [text.get_text() for text in axes.texts] == ["ddp:1", "0.90×", "best of ours:\ndear"]
    axes.texts[-1].remove()
    winners._one(axes, 2, 0, comparison.Compared("acp:4", "acp:4", "ddp:1", 1.2, (1.1, 1.3)), {"acp:4"})
    assert [text.get_text() for text in axes.texts[-3:]] == ["acp:4 †", "1.20×", "best rival:\nddp:1"]
    plt.close(figure)


@pytest.mark.usefixtures("quick_pictures")
def test_speed_wins_nothing_where_the_loss_did_not_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held = drawn(monkeypatch, tmp_path, reported.training(), reported.convergence({"ddp": 1.0, "acp:4": 1.02}))
    assert held["500mbit"][0].winner == "acp:4"
    lost = drawn(monkeypatch, tmp_path, reported.training(), reported.convergence({"ddp": 1.0, "acp:4": 1.05}))
    assert lost["500mbit"][0].winner == "ddp+fp16:4"


@pytest.mark.usefixtures("quick_pictures")
def test_seeds_of_the_very_setting_say_more_of_the_loss_than_other_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def seeded(of_acp: float) -> dict[str, Any]:
        made = [reported.training() for _ in range(2)]
        for seed, one in enumerate(made):
            one["cells"][0]["plan"]["seed"] = seed
            for strategy in one["cells"][0]["strategies"]:
                strategy["held_out_loss"] = of_acp if strategy["name"] == "acp:4" else 1.0
        return {**made[0], "cells": [one["cells"][0] for one in made]}

    elsewhere = reported.convergence({"ddp": 1.0, "acp:4": 1.5})
    assert drawn(monkeypatch, tmp_path, seeded(1.02), elsewhere)["500mbit"][0].winner == "acp:4"
    assert drawn(monkeypatch, tmp_path, seeded(1.05))["500mbit"][0].winner == "ddp+fp16:4"
    assert "with a loss more than 3% above dense: acp:4 (gpt with sgd, +5.0%)" in page(tmp_path, one=seeded(1.05))


# The report of any files


@pytest.mark.usefixtures("quick_pictures")
def test_every_number_comes_from_the_results(tmp_path: Path) -> None:
    """Changes one number at a time and looks for it, and for what it makes of others."""
    before = page(tmp_path, training=reported.training())
    # Two rounds of 200 and 400 ms: the median of the rounds, the ratio to the best DDP, the share of the bound.
    assert "dear:sharded 300.0 220-380 1.250" in before
    slower = reported.training(steps={**reported.STEPS, "dear:sharded": 240.0})
    after = page(tmp_path, training=slower)
    assert "dear:sharded 360.0 264-456 1.042" in after and "300.0 220-380" not in after
    cheaper = reported.training()
    for block in cheaper["cells"][0]["strategies"][5]["blocks"]:
        block["compressor"][0]["encode_ms"] = block["compressor"][1]["encode_ms"] = 16.0
    # 99% of 12.5 MB less at 500 Mbit/s are 198 ms.
    assert "acp:4 122 KiB 11.9 MiB 198.0 7.5 190.5" in before
    assert "acp:4 122 KiB 11.9 MiB 198.0 17.5 180.5" in page(tmp_path, training=cheaper)


def test_every_table_is_there_with_its_file_machine_and_commit(tmp_path: Path) -> None:
    made = page(
        tmp_path,
        training=reported.training(),
        convergence=reported.convergence({"ddp": 1.0, "acp:4": 1.01}),
        collectives=reported.collectives(),
        compressors=reported.compressors(),
        bandwidth=reported.bandwidth(),
    )
    assert "fsdp2 failed: rank 1: RuntimeError: no luck <today>" in made
    assert "native: rank 0: RuntimeError: [Errno 2] not here" in made
    assert "sign encode 2.00 6.0 75 10.00 5.0 5.0" in made  # 12 MB in 2 ms, of a copy's 8 GB/s
    assert "acp:4 125 Mbit/s 1.120 62 Mbit/s 1.310" in made and "dear:sharded 200.0 30.0 60.0 5.0" in made
    for name in ("training", "convergence", "collectives", "compressors", "bandwidth"):
        assert re.search(rf"## {name} {name}\.json: Abacus 9, 2 cores.*?commit c0ffee.*?Command: `python", made), name
    linked = re.findall(r"\]\(([^)]*)\)", made)
    assert sorted(linked) == sorted(path.name for path in (tmp_path / "out").glob("*.png")) and len(linked) == 3
    assert str(tmp_path) not in made


# Repeatability


def test_two_runs_of_a_table_are_laid_side_by_side() -> None:
    first = records.Source("a.json", "training", reported.training(when="1"))
    # All 10% slower, DDP included, but for dear: its ratio changes from 1.25 to 1.375.
    steps = {name: ms if name == "dear:sharded" else 1.1 * ms for name, ms in reported.STEPS.items()}
    second = records.Source("b.json", "training", reported.training(when="2", steps=steps))
    other = records.Source("c.json", "training", reported.training(rate="1gbit", when="3"))
    (one,) = repeats.twice_measured(repeats.of_training(comparison.cells([second, other, first])))
    assert (one.first, one.second) == (first, second)
    dear, ddp = one.rows.loc["dear:sharded"], one.rows.loc["ddp:25"]
    assert dear.took == 1 and dear.ratio == pytest.approx(1.1)
    assert ddp.took == pytest.approx(1.1) and ddp.ratio == pytest.approx(1)
    assert one.off_by == (pytest.approx(0, abs=1e-9), pytest.approx(10))


def test_repeats_of_collectives_and_far_off_ones() -> None:
    runs = [
        records.Source(f"{number}.json", "collectives", reported.collectives(us, when=str(number)))
        for number, us in enumerate((1000.0, 2000.0))
    ]
    (one,) = repeats.twice_measured(repeats.of_collectives(runs))
    assert list(one.rows.took) == [2.0]
    assert list(one.rows.ratio) == [1.0]  # to all_reduce itself


# What it is given


def test_what_it_cannot_read_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken, other, newer) = (tmp_path / name for name in ("broken.json", "other.json", "newer.json"))
    broken.write_text("{")
    other.write_text('{"name": "dear"}')
    newer.write_text('{"benchmark": "training", "schema": 99, "cells": []}')
    for path, says in [
        (broken, "cannot be read"),
        (other, "no results"),
        (newer, "newer version"),
        (tmp_path, "cannot"),
    ]:
        with pytest.raises(SystemExit):
            command.main([str(path), "--out", str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert says in said and str(path) in said and len(said.splitlines()) == 1
    with pytest.raises(records.SourceError, match=r"called training\.json"):
        (tmp_path / "again").mkdir()
        again = reported.write(tmp_path / "again", training=reported.training())
        records.load([*reported.write(tmp_path, training=reported.training()), *again])


def test_provenance_names_what_differs() -> None:
    one = records.Source("a.json", "training", reported.training())
    same = records.Source("b.json", "training", reported.training())
    changed = records.Source("c.json", "training", reported.training(commit="0123456789abcdef+changes"))
    lines = records.provenance([one, same, changed, one])
    assert lines[0].startswith("a.json, b.json: Abacus 9, 2 cores, 4 GiB; torch 2.x; commit c0ffeec0ffee")
    assert lines[1].endswith("commit 0123456789ab+changes") and len(lines) == 2
