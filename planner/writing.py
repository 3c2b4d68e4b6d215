"""Whether a file that is to be written at the end can be, before anything is computed for it."""

from __future__ import annotations

import os
from pathlib import Path


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
