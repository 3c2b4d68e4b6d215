"""What a command writes, and whether it can, before anything is computed for it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

HERE = Path("-")  # where --json names no file: standard output, in place of what people read


def check_writable(option: str, path: Path) -> None:
    """Makes the folder. Raises ValueError, of one sentence that names the option."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written ({error.strerror}): name another file.") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written (permission denied): name another file.")


def json_option(parser: argparse.ArgumentParser, what: str) -> None:
    """``--json`` or ``--json FILE``."""
    parser.add_argument(
        "--json", type=Path, nargs="?", const=HERE, metavar="FILE", help=f"{what}, as JSON in place of text, or to FILE"
    )


def check_json(path: Path | None) -> None:
    """Raises ValueError, of one sentence."""
    if path not in (None, HERE):
        assert path is not None
        check_writable("--json", path)


def write_json(path: Path | None, payload: Any) -> None:
    """Where :func:`json_option` says."""
    if path == HERE:
        print(json.dumps(payload, indent=1))
    elif path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(payload, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"--json {path} cannot be written ({error.strerror}): name another file.") from error
