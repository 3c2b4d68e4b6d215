"""Transformers: ``attach(trainer)`` before ``trainer.train()``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel as DDP

from dear.engine import Engine
from dear.integrations._optional import base_class
from dear.integrations._session import Session, read_file, uncompiled_model, write_file
from dear.integrations.accelerate import inner_optimizer, remember_step

__all__ = ["DearCallback", "attach"]

_TrainerCallback: Any = base_class("transformers", "TrainerCallback", "transformers accelerate")


class DearCallback(_TrainerCallback):
    """Puts the schedule, or a compressor alone, under the Trainer's DDP module while ``train()`` runs.

    ``max_grad_norm`` clips, and the logged ``grad_norm`` is plain DDP's. Checkpoints have the optimizer's full state,
    and a file ``dear.pt`` with the compressor's, the order of the buckets, and what a tuner or ``"auto"`` has found.
    ``train(resume_from_checkpoint=...)`` finds it there.

    Args:
        trainer: callbacks are not told the DDP module; the trainer knows it.
        register: ``compress.register`` puts the compressor on as a plain hook, without the schedule.
        options: of :func:`dear.attach`.
    """

    def __init__(self, trainer: Any, *, register: Callable[[DDP, Any], Any] | None = None, **options: Any) -> None:
        super().__init__()
        self._trainer = trainer
        self._session = Session(options, register)
        self._resumes_from: str | None = None  # the folder, where train() was told one
        train = trainer.train

        @functools.wraps(train)
        def remember_and_train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            named = isinstance(resume_from_checkpoint, (str, os.PathLike))  # True takes the last one
            self._resumes_from = os.fspath(resume_from_checkpoint) if named else None
            return train(resume_from_checkpoint, *args, **kwargs)

        trainer.train = remember_and_train  # callbacks are not told where a checkpoint is

    @property
    def engine(self) -> Engine:
        """The engine, while ``train()`` runs."""
        return self._session.engine

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is wrapped, and a checkpoint has been loaded."""
        optimizer, model = self._trainer.optimizer, uncompiled_model(self._trainer.model_wrapped)
        if not isinstance(model, DDP):
            raise TypeError(
                f"The Trainer has wrapped the model in {type(model).__name__}, not in "
                "DistributedDataParallel: start the script with torchrun, without FSDP or DeepSpeed."
            )
        if state.global_step:
            folder = self._resumes_from or self._folder(args, state)
            self._session.load(read_file(folder), folder)
        self._session.begin(model, [inner_optimizer(optimizer)])
        remember_step(optimizer)
        # Last, so that it hears of a checkpoint that a callback of the user's asks for. In a new list, since this one
        # is being walked through.
        handler = self._trainer.callback_handler
        handler.callbacks = [*(each for each in handler.callbacks if each is not self), self]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer saves after this, on one rank alone, so all ranks gather before."""
        self._gather_if_saving(args, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As after a step."""
        self._gather_if_saving(args, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The best model is saved right after its evaluation."""
        self._gather_if_saving(args, control, best=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has saved."""
        self._session.hide_full_state()
        rest = self._session.state()
        if args.should_save:
            write_file(self._folder(args, state), rest)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Model and optimizer are plain DDP's again."""
        self._session.end()

    def _gather_if_saving(self, args: Any, control: Any, best: bool = False) -> None:
        if control.should_save or (best and args.save_strategy == "best"):
            self._session.show_full_state()

    @staticmethod
    def _folder(args: Any, state: Any) -> str:
        return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")


def attach(trainer: Any, **options: Any) -> DearCallback:
    """Adds a :class:`DearCallback` with these options to a ``transformers.Trainer``; returns it."""
    callback = DearCallback(trainer, **options)
    trainer.add_callback(callback)
    return callback
