"""Lightning: a callback for any ``DDPStrategy``, on any device.

``Trainer(strategy="ddp", callbacks=[DearCallback()])`` trains under the schedule, with Lightning's own clipping,
checkpoints, accumulation and precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel as DDP

from dear.engine import Engine
from dear.integrations._optional import base_class
from dear.integrations._session import Session

__all__ = ["DearCallback", "DearStrategy"]

_Callback: Any = base_class("lightning.pytorch.callbacks", "Callback", "lightning")
_DDPStrategy: Any = base_class("lightning.pytorch.strategies", "DDPStrategy", "lightning")


class DearCallback(_Callback):
    """Puts the schedule, or a compressor alone, under Lightning's DDP module while ``fit()`` runs.

    Several optimizers, which Lightning has under manual optimization, step in the same order on every rank.
    Checkpoints have the optimizers' full state, and the callback's own: the compressor's, error feedback included, the
    order of the buckets, and what a tuner or ``"auto"`` has found. Plain DDP can load them, and this can load plain
    DDP's.

    Args:
        register: ``compress.register`` puts the compressor on as a plain hook, without the schedule, also on devices
            for which Lightning leaves ``ddp_comm_hook`` out.
        options: of :func:`dear.attach`, such as ``compressor``, ``update`` and ``bucket_cap_mb``.
    """

    def __init__(self, *, register: Callable[[DDP, Any], Any] | None = None, **options: Any) -> None:
        super().__init__()
        self._session = Session(options, register)
        self._resuming = False

    @property
    def engine(self) -> Engine:
        """The engine, while ``fit()`` trains."""
        return self._session.engine

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning has wrapped the model."""
        if not isinstance(trainer.strategy.model, DDP):
            raise TypeError(
                f"{type(trainer.strategy).__name__} does not wrap the model in DistributedDataParallel: use "
                'Trainer(strategy="ddp").'
            )
        if trainer.ckpt_path and not self._resuming:
            self._session.load(None, str(trainer.ckpt_path))
        self._resuming = False
        self._session.begin(trainer.strategy.model, trainer.optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Lightning asks for it before it asks for the optimizer's state, on every rank."""
        state = self._session.state()
        self._session.show_full_state()
        return state

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Everything has been read."""
        self._session.hide_full_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls it before it wraps the model."""
        self._resuming = True
        self._session.load(state_dict, "The checkpoint")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning takes the model apart after this."""
        self._session.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Other ranks may not have come here."""
        self._session.give_up(exception)


class DearStrategy(_DDPStrategy):
    """``DDPStrategy`` with a :class:`DearCallback` of its own: ``Trainer(strategy=DearStrategy())``.

    Args:
        attach: options of :class:`DearCallback`.
        options: of ``DDPStrategy``.
    """

    strategy_name = "dear"

    def __init__(self, attach: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.callback = DearCallback(**(attach or {}))

    def setup_environment(self) -> None:
        """Lightning calls it before it attaches the model's callbacks, once the trainer knows the strategy."""
        super().setup_environment()
        trainer = self.lightning_module.trainer
        if self.callback not in trainer.callbacks:
            trainer.callbacks.insert(0, self.callback)
