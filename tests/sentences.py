"""The text that a source can show: its string literals, with a mark where a value is filled in.

python tests/sentences.py     lists what the library raises and docs/troubleshooting.md does not quote
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

HOLE = "…"
ROOT = Path(__file__).resolve().parent.parent

# A string literal of C++, a comment or a character; what matters is that quotes inside the last two begin no literal.
_CPP = re.compile(r'//[^\n]*|/\*.*?\*/|\'(?:\\.|[^\'\\])\'|"((?:\\.|[^"\\\n])*)"', re.DOTALL)
_ESCAPES = {r"\"": '"', r"\\": "\\", r"\n": "\n", r"\t": "\t"}


def of_python(source: str) -> list[str]:
    """Every string of a Python source; what an f-string fills in is a hole."""
    found = []
    inside: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside.update(node.values)
            parts = [str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            found.append(node.value)
    return found


def of_cpp(source: str) -> list[str]:
    """Every string of a C++ source; literals side by side are one, and what stands between two in a call is a hole."""
    found: list[str] = []
    end = 0
    for match in _CPP.finditer(source):
        if match[1] is None:
            continue
        text = re.sub(r'\\["\\nt]', lambda escape: _ESCAPES[escape[0]], match[1])
        between = source[end : match.start()]
        if found and not between.strip():
            found[-1] += text
        elif found and re.fullmatch(r"[\s,+][^;{}]*", between):
            found[-1] += HOLE + text
        else:
            found.append(text)
        end = match.end()
    return found


def raised_by_python(source: str) -> list[str]:
    """The strings of a source's raise statements."""
    raises = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise) and node.exc is not None]
    return [text for node in raises for text in of_python(ast.unparse(node))]


def of_library() -> list[str]:
    """Everything that ``dear``, ``compress``, ``precondition``, the native module and ``auto`` can say."""
    found = []
    for name in ("auto", "room", "trials"):
        found += of_python((ROOT / "planner" / f"{name}.py").read_text())
    for folder in ("dear", "compress", "precondition"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            found += of_python(path.read_text())
    for path in sorted((ROOT / "csrc").glob("**/*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            found += of_cpp(path.read_text())
    for name in ("setup.py", "CMakeLists.txt"):
        text = (ROOT / name).read_text()
        found += of_python(text) if name.endswith(".py") else of_cpp(text.replace("#", "//"))
    return found


def unquoted(page: str) -> list[str]:
    """What the library raises and ``page`` does not have; in C++, whatever looks like a sentence. Without the checks of
    the operators' arguments, which that page leaves out."""
    known = " ".join(page.split())
    found = []
    for folder in ("dear", "compress", "precondition"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            found += raised_by_python(path.read_text())
    for path in sorted((ROOT / "csrc").glob("**/*.cpp")):
        found += of_cpp(path.read_text()) if path.parent.name != "ops" else []
    texts = [" ".join(text.split()) for text in found if len(text) > 25 and text.count(" ") > 2]
    return [text for text in texts if not all(len(part) < 6 or part.strip() in known for part in text.split(HOLE))]


if __name__ == "__main__":
    print("\n".join(unquoted((ROOT / "docs" / "troubleshooting.md").read_text())))
