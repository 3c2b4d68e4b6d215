"""Each message that the page of troubleshooting quotes is one that the library can show."""

from __future__ import annotations

import re

import pytest
import sentences

PAGE = sentences.ROOT / "docs" / "troubleshooting.md"
BLOCKS = re.findall(r"^```text\n(.*?)\n```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
QUOTED = [" ".join(block.split()) for block in BLOCKS]

SHORTEST = 10  # letters that a half of a sentence has at least


@pytest.fixture(scope="module")
def fragments() -> list[str]:
    return [" ".join(part.split()) for text in sentences.of_library() for part in text.split(sentences.HOLE)]


def test_page_quotes_messages_once():
    assert len(QUOTED) > 100
    assert sorted(QUOTED) == sorted(set(QUOTED))


def said(part: str, fragments: list[str]) -> bool:
    """Whether one string of the sources has this part, or two have its two halves, as where one function's words go
    into another's sentence."""
    if any(part in fragment for fragment in fragments):
        return True
    halves = ((part[: space.start()], part[space.end() :]) for space in re.finditer(" ", part))
    return any(
        len(first) >= SHORTEST <= len(second)
        and any(first in fragment for fragment in fragments)
        and any(second in fragment for fragment in fragments)
        for first, second in halves
    )


@pytest.mark.parametrize("message", QUOTED)
def test_message_is_in_the_sources(message, fragments):
    for part in message.split(sentences.HOLE):
        part = part.strip(" :)")  # a colon stands before the system's reason
        assert len(part) < 3 or said(part, fragments), f"nothing says {part!r}"


def test_what_nothing_says_is_found(fragments):
    assert said("was still in flight: wait for it first.", fragments)
    assert said("the network between the two is cut) during the", fragments)
    assert not said("the network between the two is cut) after the", fragments)
    assert not said("was still in flight: check that the moon is full.", fragments)


def test_strings_of_python():
    assert sentences.of_python('raise ValueError(f"a must be 1, not {a!r}: " "pass 1.")') == [
        "a must be 1, not …: pass 1."
    ]


def test_strings_of_cpp():
    source = """TORCH_CHECK(ok, "Rank ", rank, " is \\"late\\" "
        "again.");  // "not this"
    f('"'); g("other");"""
    assert sentences.of_cpp(source) == ['Rank … is "late" again.', "other"]
