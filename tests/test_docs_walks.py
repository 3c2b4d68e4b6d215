"""The architecture page lists and counts the files that a step passes through: a traced step must say the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^### {title}\n(.*?)(?=^###? |^How the lists)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def native_files(text: str) -> set[str]:
    return set(re.findall(r"`(csrc/[\w/]+\.(?:cpp|h))`", text))


def python_files(text: str) -> set[str]:
    return set(re.findall(r"`((?:dear|compress)/\w+\.py)`", text))


def files_of_a_step(rank: int, world: int, compressed: bool) -> list[str]:
    """The files of `dear` and `compress` in which a function is called during one step in steady state."""
    torch.manual_seed(0)
    model = DDP(torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(6))))
    optimizer = torch.optim.AdamW(model.parameters())
    entered: set[str] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parent in (ROOT / "dear", ROOT / "compress"):
            entered.add(str(path.relative_to(ROOT)))

    def step() -> None:
        model(torch.ones(2, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with dear.attach(model, optimizer, compressor=compress.ACPSGD(rank=4) if compressed else None):
        for _ in range(5):  # the first lays the buckets
            step()
        sys.setprofile(profile)
        try:
            step()
        finally:
            sys.setprofile(None)
    return sorted(entered)


def test_counts_are_those_of_the_lists():
    dense, compressed = (section(f"The files of a {kind} step") for kind in ("dense", "compressed"))
    shared = native_files(dense.partition("Also entered")[2])  # "in C++ the same files as in a dense step"
    vectors = native_files(compressed.partition("Vectors travel dense")[2])
    assert len(vectors) == 2
    absent = native_files(compressed.rpartition("in C++ the same files")[2].partition(";")[0])
    assert absent < shared
    both = native_files(compressed) - vectors | shared
    for text, native in (dense, native_files(dense)), (compressed, both - absent):
        python = python_files(text)
        said = re.search(
            r"(\d+)(?: files hold|, and at most \d+ are).*?(\d+)(?: are entered)?, of which (\d+)\s+are Python",
            text,
            re.DOTALL,
        )
        assert said is not None
        numbered = len(re.findall(r"^\| \d+ \|", text, re.MULTILINE))
        assert [int(one) for one in said.groups()] == [numbered, len(native | python), len(python)]


@pytest.mark.parametrize(
    ("title", "compressed", "longest"),
    [("The files of a dense step", False, 12), ("The files of a compressed step", True, 18)],
)
def test_walks_name_the_files_of_a_step(pool2, title, compressed, longest):
    text = section(title)
    found = set(pool2.run(files_of_a_step, compressed)[0])
    assert python_files(text) == found
    numbered = re.findall(r"^\| (\d+) \| `([\w/.]+)` \|", text, re.MULTILINE)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    assert 1 < len(numbered) <= longest
