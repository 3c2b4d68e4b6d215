"""The example of resuming, in a worker that kills itself: torchrun … tests/restarting.py CHECKPOINT MARKER KILLS

KILLS: ``rank:step:phase``, one for each start of the workers, separated by commas. The phases are in the order of a
step: ``forward``, ``backward``, ``save``, and on rank 0 ``write``, when half of the checkpoint's file is there.
``start`` kills before the process group is made.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import resume

import dear


def main(checkpoint: str, marker: str, kills: str) -> None:
    start = len(list(Path(marker).parent.glob(f"{Path(marker).name}.*")))  # how often a worker has been killed
    plans = [kill.split(":") for kill in kills.split(",") if kill]
    victim, at, phase = plans[start] if start < len(plans) else ("-1", "-1", "")

    def die_if(step: int, now: str) -> None:
        if os.environ["RANK"] == victim and step == int(at) and now == phase:
            Path(f"{marker}.{start}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    whole, loss_of, save, init = torch.save, resume.loss_of, resume.save, dear.init_process_group

    def watched_loss(model: Any, step: int) -> torch.Tensor:
        die_if(step, "forward")
        loss = loss_of(model, step)
        if model.training and torch.is_grad_enabled():
            loss.register_hook(lambda _: die_if(step, "backward"))
        return loss

    def watched_save(path: str, step: int, model: Any, engine: Any) -> None:
        die_if(step - 1, "save")
        torch.save = functools.partial(half_saved, step - 1)
        try:
            save(path, step, model, engine)
        finally:
            torch.save = whole

    def half_saved(step: int, state: Any, file: Any, **options: Any) -> None:
        if not isinstance(file, (str, os.PathLike)):  # how a tensor is pickled
            whole(state, file, **options)
            return
        whole(state, file)
        with open(file, "r+b") as written:
            written.truncate(os.path.getsize(file) // 2)
        die_if(step, "write")
        whole(state, file)

    def watched_init(**options: Any) -> None:
        die_if(0, "start")
        init(timeout=60, **options)

    resume.loss_of, resume.save, dear.init_process_group = watched_loss, watched_save, watched_init
    resume.main(checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
