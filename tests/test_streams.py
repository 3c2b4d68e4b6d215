"""Which stream waits for what on a GPU, without one: the program of tests/native/streams.cpp."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # cmake and ninja are beside Python


def compiler() -> str | None:
    """The C++ compiler that CMake would take."""
    named = os.environ.get("CXX", "").split()  # CXX may have flags behind it
    return next(filter(None, (shutil.which(name, path=PATH) for name in named[:1] or ("c++", "g++", "clang++"))), None)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of compiling, on a machine that may be busy
def test_each_stream_waits_for_what_it_must(tmp_path: Path) -> None:
    if not all(shutil.which(tool, path=PATH) for tool in ("cmake", "ninja")):
        pytest.skip("cmake and ninja are not installed, which build the program of this test")
    if compiler() is None:
        pytest.skip("there is no C++ compiler, which builds the program of this test")
    build = [
        ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", tmp_path, "--target", "streams"],
    ]
    for command in build:
        done = subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    ran = subprocess.run([tmp_path / "streams"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stderr
