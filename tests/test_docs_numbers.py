"""The numbers of docs/choosing.md and docs/compression.md are those of the generated pages of results."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from benchmarks.spelling import split_name
from compress.presets import preset as preset_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
CHOOSING = (DOCS / "choosing.md").read_text()
SPELLED = {  # there, and in the tables
    "Dense(torch.bfloat16)": "bf16",
    "PowerSGD(rank=8)": "power:8",
    "PowerSGD(rank=4)": "power:4",
    "ACPSGD(rank=8)": "acp:8",
    "ACPSGD(rank=4)": "acp:4",
    "TopK(density=0.01)": "topk:0.01",
    "SignSGD()": "sign",
}


def test_speed_by_link_rate():
    ratios = defaultdict(list)
    rows = (DOCS / "results" / "steps.md").read_text()
    for rate, ratio in re.findall(r"^\| 2 workers, ([^,|]+), sgd \|.*\| ([\d.]+)× \([^|]*\) \|$", rows, re.MULTILINE):
        ratios[rate].append(ratio)
    said = re.findall(r"^\| ([\w.]+ [\w/ ]+) \| ([\d.–]+)× \|$", CHOOSING, re.MULTILINE)
    assert len(said) > 4
    for rate, text in said:
        low, high = min(ratios[rate], key=float), max(ratios[rate], key=float)
        assert text == (low if low == high else f"{low}–{high}"), rate


def test_losses():
    rows = (DOCS / "results" / "losses.md").read_text()
    found = re.findall(r"^\| (\S+) \| \S+ \| gpt, adamw, 300 steps \| 3 \| [\d.]+ \| \**([\d.]+)×", rows, re.MULTILINE)
    above = defaultdict(set)
    for name, ratio in found:
        above[name].add(float(ratio))
    said = re.findall(r"^\| `(\S+)` \| (?:level \(([\d.]+)×\)|([\d.]+)% above) \|$", CHOOSING, re.MULTILINE)
    assert len(said) == len(SPELLED)
    for call, level, percent in said:
        ratios = above[SPELLED[call]]
        assert ratios, call
        written = float(level) if level else 1 + float(percent) / 100
        digits = 3 if level or "." in percent else 2
        assert any(abs(round(ratio, digits) - written) < 1e-9 for ratio in ratios), f"{call}: {ratios}"


def test_presets():
    """What the page on compression says of presets is what the results say of their strategies."""
    rows = defaultdict(dict)
    losses = (DOCS / "results" / "losses.md").read_text()
    title = r"^### (\S+, \S+), 3000 steps(?:, up to \d+ held-out examples)?\n(.*?)(?=^#)"
    for training, body in re.findall(title, losses, re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^\| (.*) \|$", body, re.MULTILINE):
            name, _, seeds, _, _, to_dense, fewer, *_ = line.split(" | ")
            if seeds.isdigit() and int(seeds) >= 3:
                rows[training][name] = to_dense, fewer
    page = (DOCS / "compression.md").read_text()
    found = re.findall(r"^\| \*(\w+)\* \| (\S+, \S+) \| ([+-][\d.]+%) \| ([\d.]+×) \|$", page, re.MULTILINE)
    assert len(found) > 4
    for preset, training, to_dense, fewer in found:
        name = {"safe": "int3:scale=element:start=150:first=int8", "fast": "fast:start=150"}[preset]
        trained, said = split_name(name.split(":"))[0].make(), preset_of(preset, start_step=150)
        assert (type(trained), trained.options()) == (type(said), said.options())
        assert rows[training][name] == (to_dense, fewer), (preset, training)
    above = [float(to_dense.rstrip("%")) for preset, _, to_dense, _ in found if preset == "fast"]
    assert f'`preset("fast")` {min(above)} to {max(above)}% above it' in " ".join(CHOOSING.split())
