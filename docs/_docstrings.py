"""What the docstrings say in Sphinx's way, said in Markdown, for the API pages. An extension of griffe.

Roles become code, a literal block's two colons one, and tables drawn with lines keep their columns. "Others", as the
compressors call the options they hand on, are the parameter ``**options``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|exc|data):`~?([^`]+)`")
RULE = re.compile(r"^\s*(?:={4,}|-{4,})(?:\s+(?:={4,}|-{4,}))+\s*$")


def to_markdown(text: str) -> str:
    """A docstring's text with roles, literal blocks and drawn tables as Markdown has them."""
    text = ROLE.sub(r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s+)Others: ", r"\1**options: ", text, flags=re.MULTILINE)
    blocks = re.split(r"\n{2,}", text)
    drawn = [any(RULE.match(line) for line in block.splitlines()) for block in blocks]
    return "\n\n".join(f"```text\n{block}\n```" if table else block for block, table in zip(blocks, drawn, strict=True))


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
