"""What the tests of integrations share: the surroundings of torchrun, the settings, and comparing parameters."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressing import KINDS

ROOT = Path(__file__).resolve().parent.parent

#: The settings that every framework is tested in: options of its integration.
SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": {"update": "sharded", "bucket_cap_mb": 0.002},
    "replicated": {"update": "replicated", "bucket_cap_mb": 0.002},
    "owned": {"update": "owned", "bucket_cap_mb": 0.002},
}
COMPRESSORS = ("bf16", "power", "acp", "topk", "sign")


def options(name: str) -> dict[str, Any]:
    """The options of an integration by name: a setting, a setting and "-large" for buckets of the usual size, a
    compressor under the schedule, or "hook-" and one."""
    if name in SETTINGS:
        return dict(SETTINGS[name])
    if name.endswith("-large"):
        return {"update": name.removesuffix("-large")}
    kind = KINDS[name.removeprefix("hook-")](min_compression_ratio=0.2)
    if name.startswith("hook-"):
        import compress

        return {"register": compress.register, "compressor": kind}
    return {"compressor": kind, "bucket_cap_mb": 0.002}


def optimizer_for(name: str | None) -> Any:
    """A kind of optimizer that suits the setting: with owned updates one that wants its parameters whole."""
    return torch.optim.Adafactor if name is not None and name.startswith("owned") else torch.optim.AdamW


def check_replicas(state: dict[str, torch.Tensor]) -> None:
    """Equal on every rank, bit for bit. Collective."""
    for name, value in state.items():
        every = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, value.contiguous())
        assert all(torch.equal(each, value) for each in every), name


def averages(history: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """The exponential moving average of what the parameters were after each step, which begins with the first."""
    average = {name: value.clone() for name, value in history[0].items()}
    for state in history[1:]:
        for name, value in state.items():
            average[name].lerp_(value, 1 - decay)
    return average


@contextlib.contextmanager
def as_torchrun(rank: int, world: int) -> Iterator[None]:
    """The variables that torchrun sets, and quiet frameworks."""
    before = dict(os.environ)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="1", TORCHELASTIC_RUN_ID="test", GLOO_SOCKET_IFNAME="lo",
        HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        os.environ.clear()
        os.environ.update(before)


def torchrun(script: Path, *arguments: str, how: tuple[str, ...] = ("--standalone",), patience: float = 250) -> str:
    """What two workers print that torchrun starts, who must end well within ``patience`` seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", *how, "--nproc_per_node=2", str(script), *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "MASTER_"))}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            output = process.communicate(timeout=patience)[0]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output
    return output


def same(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor], exact: bool = True, what: str = "") -> None:
    """Equal parameters, bit for bit or to rounding."""
    assert have.keys() == want.keys()
    for name, value in want.items():
        if exact:
            assert torch.equal(have[name], value), f"{what} {name}: {(have[name] - value).abs().max()}"
        else:
            torch.testing.assert_close(have[name], value, msg=lambda text, name=name: f"{what} {name}: {text}")
