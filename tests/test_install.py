"""Building against the torch that is installed, also where pip isolates the build from it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEED_TORCH = "import runpy, setuptools; setuptools.setup = lambda **_: None; runpy.run_path('setup.py')['need_torch']()"


@pytest.fixture
def isolated(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python finds no torch, by PYTHONPATH as in pip's isolated builds."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # cmake and ninja are beside Python
    return {**os.environ, "PYTHONPATH": str(tmp_path / "hidden"), "PATH": path}


def need_torch(python: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.executable = {str(python)!r}; {NEED_TORCH}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


def test_an_isolated_build_finds_the_installed_torch(isolated: dict[str, str]) -> None:
    without = subprocess.run([sys.executable, "-c", "import torch"], env=isolated, capture_output=True, text=True)
    assert "ModuleNotFoundError" in without.stderr
    done = need_torch(sys.executable, isolated)
    assert done.returncode == 0, done.stderr


def test_without_torch_there_is_one_sentence(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = need_torch(tmp_path / "bare" / "bin" / "python")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: torch is not installed in this environment: install torch 2.11 to 2.15 first")


def test_a_source_distribution_can_be_built(tmp_path: Path) -> None:
    """It holds what the native build reads; CMake refuses to configure without the sources of each target."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for folder in (ROOT / "csrc", ROOT / "tests" / "native"):
        native = {str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.is_file()}
        assert native and native <= held
    assert {"CMakeLists.txt", "benchmarks/report/pages/index.md"} <= held


@pytest.mark.slow
def test_cmake_finds_the_installed_torch_too(isolated: dict[str, str], tmp_path: Path) -> None:
    if not all(shutil.which(tool, path=isolated["PATH"]) for tool in ("cmake", "ninja")):
        pytest.skip("cmake and ninja are not installed")
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(configure, env=isolated, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    assert str(Path(found.origin).parent / "include") in (tmp_path / "build" / "build.ninja").read_text()
