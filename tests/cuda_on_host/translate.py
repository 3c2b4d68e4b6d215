"""Writes a CUDA source as C++: python translate.py FILE.cu FILE.cpp. What it needs then is in emulation.h.

kernel<T><<<grid, threads, shared, stream>>>(arguments) becomes a call of emulated::launch, and an alignment goes in
front of __shared__, where C++ wants it.
"""

import re
import sys
from pathlib import Path


def end_of(text: str, at: int) -> int:
    """Behind what closes the parenthesis at this place."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise SystemExit(f"A parenthesis is not closed: {text[at : at + 60]!r}.")


def translated(text: str) -> str:
    """All launches as calls."""
    while found := re.search(r"([\w:]+(?:<[^<>;{}()]*(?:<[^<>;{}()]*>)?[^<>;{}()]*>)?)\s*<<<", text):
        ended = text.index(">>>", found.end())
        begin = text.index("(", ended)
        end = end_of(text, begin)
        call = f"::emulated::launch({text[found.end() : ended]}, [&] {{ {found[1]}{text[begin:end]}; }})"
        text = text[: found.start()] + call + text[end:]
    return re.sub(r"__shared__ (alignas\(\w+\))", r"\1 __shared__", text)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f'#include "emulation.h"\n#line 1 "{source}"\n' + translated(source.read_text()))
