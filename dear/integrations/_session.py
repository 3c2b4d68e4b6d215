"""One training run in a framework's hands: what every integration does, whatever calls it."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear._findings import AUTO, TUNER
from dear.attaching import attach
from dear.engine import Engine

__all__ = ["FILE", "Session", "read_file", "uncompiled_model", "warn_without_feedback", "write_file"]

FILE = "dear.pt"  #: beside a framework's own files in a checkpoint


def uncompiled_model(model: Any) -> Any:
    """What ``torch.compile(model)`` is around, as frameworks compile the DDP module; anything else as it is."""
    return getattr(model, "_orig_mod", model)


def write_file(folder: str, state: dict[str, Any]) -> None:
    """Puts the state into :data:`FILE` at once: a worker that dies while writing leaves there what was there."""
    path = os.path.join(folder, FILE)
    torch.save(state, f"{path}.partial")
    os.replace(f"{path}.partial", path)


def read_file(folder: str) -> dict[str, Any] | None:
    """What :func:`write_file` has put there; None where nobody has."""
    path = os.path.join(folder, FILE)
    return torch.load(path, weights_only=True) if os.path.exists(path) else None


def warn_without_feedback(where: str, compressor: Any) -> None:
    """A checkpoint was saved without this library, or without the compressor.

    where: names it.
    """
    if getattr(compressor, "error_feedback", False):  # "auto" is none yet
        warnings.warn(
            f"{where} has no error feedback of the compressor, so training goes on without what was not sent yet: save "
            "checkpoints while this integration is in use.",
            stacklevel=4,
        )


class Session:
    """Attaches when the framework has wrapped the model, and keeps what its checkpoints have no place for: the
    compressor's state, error feedback included, the order of the buckets, and what a tuner or ``"auto"`` has found.

    Args:
        options: of :func:`dear.attach`.
        register: puts ``options["compressor"]`` on the DDP module as a plain hook, in place of the schedule:
            ``compress.register``.
    """

    def __init__(self, options: dict[str, Any], register: Callable[[DDP, Any], Any] | None = None) -> None:
        if register is not None and set(options) != {"compressor"}:
            raise ValueError(
                "register puts a compressor on as a plain hook: pass compressor with it, and nothing else."
            )
        self._options, self._register = options, register
        self._engine: Engine | None = None
        self.registration: Any = None  #: what register() has returned, while it counts
        self._optimizers: list[Optimizer] = []
        self._full = ExitStack()
        self._later: tuple[Any, str] | None = None  # a state that came before the model
        self._last: dict[str, Any] = {}  # the state at detach()

    @property
    def engine(self) -> Engine:
        """The engine while it is attached.

        Raises:
            RuntimeError: training has not begun, or has ended, or a compressor is on as a plain hook.
        """
        if self._engine is None:
            raise RuntimeError("There is no engine now: ask for it between the framework's begin and end of training.")
        return self._engine

    def begin(self, model: Any, optimizers: Sequence[Optimizer]) -> Engine | None:
        """Attaches to the framework's DDP module and its optimizers. Collective."""
        if self._register is not None:
            self.registration = self._register(model, self._options["compressor"])
        else:
            self._optimizers = list(optimizers)
            self._engine = attach(model, self._optimizers, **self._options)
        if self._later is not None:
            state, where = self._later
            self._later = None
            self.load(state, where)
        elif self._engine is not None:
            self._go_on(self._engine)
        return self._engine

    def _go_on(self, engine: Engine) -> None:
        """Training begins a second time: what was found about the setting in the first one is not searched again, and a
        compressor that ``"auto"`` has chosen has not sent everything yet. Collective."""
        keys = [key for key in (AUTO, TUNER) if key in self._last]
        keys += ["compressor"] if AUTO in keys and "compressor" in self._last else []
        if keys:
            engine.load_state_dict({"bucket_order": [], **{key: self._last[key] for key in keys}})

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """What the framework does not save by itself. Collective."""
        if self._engine is not None:
            return self._engine.state_dict(optimizer=False)
        if self._register is not None:
            return {"compressor": self._options["compressor"].state_dict(gather=True)}
        return self._last

    def load(self, state: dict[str, Any] | None, where: str) -> None:
        """Takes what :meth:`state` gave, now or when training begins; None where a checkpoint does not have it.

        where: names the checkpoint, in a warning.
        """
        compressor = self._options.get("compressor")
        if not state:
            warn_without_feedback(where, compressor)
        elif self._engine is not None:
            self._engine.load_state_dict(state)
        elif self._register is None or self._options["compressor"].binding is None:
            self._later = state, where
        else:
            self._options["compressor"].load_state_dict(state["compressor"])

    def show_full_state(self) -> None:
        """The optimizer has its full state from now on, until :meth:`hide_full_state` or the next step. Collective."""
        self._full.close()
        if self._engine is not None:
            self._full.enter_context(self._engine.full_state())

    def hide_full_state(self) -> None:
        """The optimizer's state is in shards again."""
        self._full.close()

    # --- the end ---

    def end(self) -> None:
        """Gives model and optimizer back to plain DDP. Collective."""
        if hasattr(self.registration, "remove"):
            self.registration.remove()
            self.registration = None
        if self._engine is not None:
            self._full.close()
            self._last = self._engine.state_dict(optimizer=False)
            self._engine.detach()  # where a peer is missing it fails, and give_up() is called
            self._engine = None

    def give_up(self, error: BaseException) -> None:
        """The same after an error, which other ranks may not have: without a collective."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.__exit__(type(error), error, None)
            if engine.update != "replicated":
                # The other ranks' parts cannot be had any more; frameworks move what is there, whatever it is.
                for optimizer in self._optimizers:
                    optimizer.state = defaultdict(dict)
                    optimizer.zero_grad()
