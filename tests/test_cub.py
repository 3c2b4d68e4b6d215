"""CUB as a rival in the kernels' benchmark: compiled when asked for, and skipped with a sentence where it cannot be."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import cub
from benchmarks.kernels.cases import FAMILIES

NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], cub.NVCC]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is built, and the only place where tools are found."""
    monkeypatch.setattr(cub, "FOLDER", tmp_path / "out")
    monkeypatch.setattr(cub, "NVCC", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def fake_nvcc(folder: Path, script: str) -> None:
    program = folder / "nvcc"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_without_a_compiler_a_sentence_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cub, "library", lambda: cub.build("sm_90"))
    case = cub.threshold_case("ours", lambda: None, torch.zeros(8), torch.zeros(8), 2)
    assert case.plain is None
    assert case.failures == {"CUB": "nvcc is not on the PATH, so CUB is not measured: install CUDA's compiler."}


def test_a_compiler_that_fails_is_quoted(folder: Path) -> None:
    fake_nvcc(folder, "echo 'fatal: no such architecture' >&2; exit 1")
    with pytest.raises(cub.Unbuilt, match=r"does not compile cub_top_k\.cu, .* \(fatal: no such architecture\)"):
        cub.build("sm_1")


def test_it_is_built_once_for_an_architecture(folder: Path) -> None:
    built = "for last; do :; done; echo >> $0.ran; : > $last"
    fake_nvcc(folder, f'case "$1" in --version) echo 13 ;; *) {built} ;; esac')
    first = cub.build("sm_90")
    assert first.exists() and cub.build("sm_90") == first != cub.build("sm_80")
    assert (folder / "nvcc.ran").read_text() == "\n\n"


def test_the_host_has_no_such_rival() -> None:
    assert not [case for case in FAMILIES["top-k"](torch.randn(4096), 0.01, 4) if "CUB" in case.name]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_source_compiles_and_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the call ends in CUDA's own sentence."""
    monkeypatch.setattr(cub, "FOLDER", tmp_path)
    library = cub.Library(cub.build("sm_90"))
    assert library.name in ("CUB's DeviceTopK", "CUB's DeviceRadixSort")
    with pytest.raises(RuntimeError, match=r"CUB failed: .*(driver|device)"):
        library.bytes_needed(1 << 20, 1 << 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_it_finds_the_threshold_of_cuda_tensors() -> None:
    with torch.device("cuda"):
        grad, error, out = torch.randn(100_003), torch.randn(100_003), torch.zeros(1)
        library = cub.library()
        workspace = torch.empty(library.bytes_needed(100_003, 1000), dtype=torch.uint8)
        library.threshold(grad, error, 1000, workspace, torch.empty(200_006), out)
        assert out == (grad + error).abs().topk(1000).values[-1]
