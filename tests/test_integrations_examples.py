"""The examples of frameworks, started by torchrun as they say."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import ROOT, torchrun

EXAMPLES = {
    "with_lightning": "lightning",
    "with_accelerate": "accelerate",
    "with_transformers": "transformers",
    "with_fsdp2": "torch",
    "with_dcp": "torch",
    "with_lora_fa": "peft",
    "with_ray": "ray",
    "titan_style": "torch",
    "resume": "torch",
}


def run(name: str, *arguments: str) -> list[float]:
    """The losses that an example prints."""
    if importlib.util.find_spec(EXAMPLES[name]) is None:
        pytest.skip(f"{EXAMPLES[name]} is not installed")
    output = torchrun(ROOT / "examples" / f"{name}.py", *arguments)
    found = [float(number) for number in re.findall(r"loss ([\d.]+)", output)]
    assert found, output
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["with_lightning", "with_accelerate", "with_fsdp2"])
def test_example_trains(name):
    assert run(name)[-1] < 2.0  # 2.3 is what ten classes cost before training


@pytest.mark.slow
def test_transformers_example_trains():
    first, last = run("with_transformers")
    assert last < 0.8 * first


@pytest.mark.slow
def test_lora_fa_example_trains():
    first, last = run("with_lora_fa")
    assert last < 0.9 * first  # the base model is random, and half of the factors are frozen: little can be learnt


@pytest.mark.slow
def test_ray_example_trains():
    """Ray starts the workers, in an interpreter like this one."""
    pytest.importorskip("ray.train.torch")
    command = [sys.executable, str(ROOT / "examples" / "with_ray.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=280, check=False)
    found = re.findall(r"^loss ([\d.]+)", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and found, done.stdout + done.stderr
    assert float(found[-1]) < 2.0


@pytest.mark.slow
def test_titan_style_example_resumes(tmp_path):
    """From each rank's part of the checkpoint, with the same losses and norms, to the last digit shown."""
    folder = tmp_path / "checkpoints"
    arguments = (str(folder), "aot_eager")
    want = run("titan_style", *arguments)
    assert len(want) == 3 and want[-1] < 0.8 * want[0]
    for step in ("20", "30"):
        shutil.rmtree(folder / step)
    assert run("titan_style", *arguments) == want[1:]


@pytest.mark.slow
def test_checkpoint_example_resumes(tmp_path):
    want, have = run("with_dcp", str(tmp_path / "checkpoint"))
    assert have == want


@pytest.mark.slow
def test_resume_example_resumes(tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    assert run("resume", path) == run("resume", path)  # the second one finds everything done


def test_every_example_is_tested():
    here = {path.stem for path in Path(ROOT / "examples").glob("*.py")}
    assert here == set(EXAMPLES) | {"train", "own_compressor"}


def test_every_integration_imports_without_its_framework():
    """In this process, whatever is installed; each says what it lacks when it is used."""
    for path in (ROOT / "dear" / "integrations").glob("*.py"):
        importlib.import_module(f"dear.integrations.{path.stem}")


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("lightning", "DearCallback", "lightning"), ("transformers", "DearCallback", "transformers")],
)
def test_what_is_not_installed_is_told(module, name, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    arguments = () if module == "lightning" else (None,)
    with pytest.raises(ImportError, match=f"{package} is not installed.*pip install {package}"):
        getattr(importlib.import_module(f"dear.integrations.{module}"), name)(*arguments)
