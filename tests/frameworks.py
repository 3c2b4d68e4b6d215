"""What the tests of integrations share: the surroundings of torchrun, the settings, and comparing parameters."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from compressing import KINDS

#: The settings that every framework is tested in: options of its integration.
SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": {"update": "sharded", "bucket_cap_mb": 0.002},
    "replicated": {"update": "replicated", "bucket_cap_mb": 0.002},
}
COMPRESSORS = ("bf16", "power", "acp", "topk", "sign")


def options(name: str) -> dict[str, Any]:
    """The options of an integration by name: a setting, or a compressor under the schedule, or "hook-" and one."""
    if name in SETTINGS:
        return dict(SETTINGS[name])
    kind = KINDS[name.removeprefix("hook-")](min_compression_ratio=0.2)
    if name.startswith("hook-"):
        import compress

        return {"register": compress.register, "compressor": kind}
    return {"compressor": kind, "bucket_cap_mb": 0.002}


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


def shared_folder(folder: Any) -> str:
    """A folder by the name that rank 0 has for it."""
    name = [str(folder)]
    dist.broadcast_object_list(name)
    return name[0]


def same(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor], exact: bool = True, what: str = "") -> None:
    """Equal parameters, bit for bit or to rounding."""
    assert have.keys() == want.keys()
    for name, value in want.items():
        if exact:
            assert torch.equal(have[name], value), f"{what} {name}: {(have[name] - value).abs().max()}"
        else:
            torch.testing.assert_close(have[name], value, msg=lambda text, name=name: f"{what} {name}: {text}")
