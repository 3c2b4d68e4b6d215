"""What is said where the native module is missing, or was built for another torch."""

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from dear import _built

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path, torch: str = "2.13", cuda: str = "") -> Path:
    (folder / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    (folder / "_build.py").write_text(f'TORCH = "{torch}"\nCUDA = "{cuda}"\n')
    return folder


def test_a_folder_without_a_build(tmp_path: Path) -> None:
    why = _built.refusal(tmp_path, "2.13.0+cpu", None)
    assert why is not None
    assert "make build" in why
    assert str(tmp_path) in why


@pytest.mark.parametrize("version", ["2.12.1", "2.130.0", "3.13.0"])
def test_another_torch(tmp_path: Path, version: str) -> None:
    why = _built.refusal(build(tmp_path), version, None)
    assert why is not None
    assert "built for torch 2.13" in why
    assert version in why


def test_another_cuda(tmp_path: Path) -> None:
    assert "CUDA 13.0" in str(_built.refusal(build(tmp_path, cuda="13.0"), "2.13.0", "12.8"))
    assert "has none" in str(_built.refusal(build(tmp_path, cuda="13.0"), "2.13.0", None))


def test_what_can_be_loaded(tmp_path: Path) -> None:
    assert _built.refusal(build(tmp_path), "2.13.1+cpu", None) is None
    assert _built.refusal(build(tmp_path), "2.13.0", "13.0") is None  # a module for hosts loads beside any
    assert _built.refusal(build(tmp_path, cuda="13.0"), "2.13.0", "13.0") is None


def test_check_raises_before_the_module_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "dear").mkdir()
    (tmp_path / "dear" / "__init__.py").write_text("from dear import _built\n\n_built.check()\n")
    (tmp_path / "dear" / "_built.py").write_text((ROOT / "dear" / "_built.py").read_text())
    ran = subprocess.run([sys.executable, "-c", "import dear"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("ImportError: dear is imported from ")
