"""Whether the native module can be loaded, and one sentence where it cannot, in place of ``undefined symbol``."""

from __future__ import annotations

import runpy
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

HERE = Path(__file__).resolve().parent


def facts(folder: Path = HERE) -> dict[str, str]:
    """What the module in ``folder`` was built for: ``TORCH``, its minor version, and ``CUDA``, empty without; nothing
    where somebody built it by hand."""
    path = folder / "_build.py"
    return {key: value for key, value in runpy.run_path(str(path)).items() if key.isupper()} if path.exists() else {}


def refusal(folder: Path, torch_version: str, cuda: str | None) -> str | None:
    """Why the module in ``folder`` cannot be loaded beside this torch, and what to do; None where it can.

    A module that is bound to torch's C++ classes works with the minor version that it was built with.
    """
    if not any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return (
            f"dear is imported from {folder}, where its native module was not built for this Python: run `make build` "
            "there, or start Python in another folder to import an installed one."
        )
    built = facts(folder)
    if not built:
        return None
    minor = ".".join(torch_version.split("+")[0].split(".")[:2])
    if built["TORCH"] != minor:
        return (
            f"dear was built for torch {built['TORCH']}, but torch {torch_version} is installed: "
            f"install torch {built['TORCH']}, or build dear again with `pip install .`."
        )
    if built["CUDA"] and built["CUDA"] != cuda:
        return (
            f"dear was built for a torch with CUDA {built['CUDA']}, but the installed torch {torch_version} has "
            f"{f'CUDA {cuda}' if cuda else 'none'}: install such a torch, or build dear again with "
            "`pip install .`."
        )
    return None


def check() -> None:
    """To be called before anything imports ``dear._C``.

    Raises:
        ImportError: torch or the module is missing, or the module was built for another torch.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("dear needs torch, which is not installed: install torch 2.11 to 2.15, then dear.") from None

    why = refusal(HERE, torch.__version__, torch.version.cuda)
    if why is not None:
        raise ImportError(why)
