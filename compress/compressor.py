"""The base class of all compressors: the contract, and what users call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from compress import checks, saved
from compress.contract import Contract
from compress.group import settle_errors
from compress.model_group import take_group
from compress.read_once import described
from compress.schedule_binding import ScheduleBinding
from dear.compression import Site


class Compressor(Contract):
    """Shrinks what an all-reduce of gradients sends.

    A subclass says what is sent (:meth:`encode`), how it moves (:attr:`exchange`) and what it means
    (:meth:`decode`); buckets, collectives, error feedback across bucket rebuilds, non-finite gradients and saved state
    are taken care of elsewhere. The work falls in two phases, the reduce-scatter phase and the all-gather phase:

    ==============  =====================================  ==========================================
    ``exchange``    first phase                            second phase
    ==============  =====================================  ==========================================
    ``"sum"``       encode; reduce-scatter of the payload  all-gather; decode the payloads' mean
    ``"owners"``    encode to one row for each shard's     all-gather of what was merged; decode all
                    owner; all-to-all; :meth:`merge`       ranks' rows
    ``"gather"``    encode                                 all-gather; decode all ranks' payloads
    ==============  =====================================  ==========================================

    Everything a compressor decides must be the same on every rank, and :meth:`decode` must give the same bits on
    every rank: random choices come from :meth:`generator`, never from torch's global one.

    Args:
        error_feedback: adds what was not sent to the next step's gradient.
        start_step: the first so many steps are dense. ``"warmup"``, under :func:`dear.attach` only: until the learning
            rate of no parameter group rises any more from one step to the next, as a scheduler's warm-up ends, and one
            step beyond. While none has fallen and one is below its scheduler's base (``"initial_lr"``), the warm-up
            goes on, since schedulers may be stepped once an epoch. Low-rank compressors learn their factors from the
            last dense result, and :class:`compress.Dense` its scales of elements.
        exempt: parameters that are sent exactly, never compressed: names as ``model.module.named_parameters()`` has
            them, names of modules, or patterns such as ``"*.bias"``; or a callable of name and parameter. A name that
            matches nothing is refused. Under DDP's own ``register_comm_hook`` names are as
            :mod:`compress.comm_hook` says.
        min_compression_ratio: what would shrink by less than this stays dense.
        seed: of everything random; rank 0's counts.
        nonfinite: what a gradient with inf or NaN on any rank does, on all ranks alike. ``"raise"``: ``backward()``
            (under the DeAR schedule ``step()``) raises RuntimeError. ``"skip"``: every ``.grad`` is None after
            ``backward()`` (at ``step()``), so the optimizer's step changes nothing. ``"propagate"``: the gradients of
            that bucket become NaN, which a GradScaler sees, and skips the step. The last two keep a copy of the error
            feedback and put it back. In no case does anything non-finite get into the error feedback.
        process_group: whose ranks take part; when None those of the DDP module that it comes to serve, and the default
            group's without one.

    Gradients of other types than float32, float16 and bfloat16 (that is, float64) travel dense. Not thread-safe.
    One compressor serves one model.
    """

    def __repr__(self) -> str:
        """The class with its first options, and the others that are not as by default."""
        return f"{type(self).__name__}({', '.join(described(self))})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles, its own and those of a DDP module whose hook it is.

        Raises:
            RuntimeError: always: it has native parts, and error feedback that belongs to one model.
        """
        raise RuntimeError(
            "A compressor cannot be copied or pickled, nor can a DDP module that it is under: make another one, and "
            "copy model.module or save state_dict() of both."
        )

    # --- state and statistics ---

    def state_dict(self, gather: bool = False) -> dict[str, Any]:
        """What must be saved to go on: the step, the error feedback by parameter name, and the subclass's state.

        Error feedback differs by rank. Without ``gather`` this is the state of this rank alone, and each rank must
        save its own. With ``gather`` every rank must call it, and gets the states of all, ``{"ranks": [...]}``, on the
        host. Both between two steps. Tensors are copies, flat in memory order.
        """
        take_group(self)
        return saved.save(self, gather)

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Takes one rank's state, or all ranks' (as gathered, or as a list), between two steps. Between ``backward()``
        and ``step()``, a step whose gradients are not finite is left out, whatever ``nonfinite`` says.

        At the world size it was saved at, training goes on bit for bit: each rank takes its own. At another, which
        needs all ranks' states, old rank i's error feedback, its owner's error included, is added to new rank
        ``i % world_size``, times new / old world size: so parameters are still owed the same mean gradients. In two
        levels it is of each node's mean, and fits the same nodes alone.

        Raises:
            ValueError: it is not a state of such a compressor, or not enough of it; nothing has been changed. That
                it is another model's shows at the next step, on every rank.
        """
        if isinstance(state, dict) and "bucket_order" in state:
            raise ValueError(
                "This is an engine's state, of which the compressor's is a part: pass state[\"compressor\"], or use "
                "engine.load_state_dict()."
            )
        take_group(self)
        saved.load(self, state)

    def measure(self) -> None:
        """The next step also reduces the gradients densely, and :meth:`stats` will tell how far off the result was."""
        if self.binding is not None:
            self.binding.measure_next()
        else:
            self.measure_first = True

    def stats(self) -> dict[str, float | int | None]:
        """Numbers of the last finished step on this rank; reads the device, so ask seldom.

        ``bytes_sent`` and ``dense_bytes`` (what a dense all-reduce of the same gradients sends); ``error_norm`` (of
        the error feedback); ``vnmse`` of the last step that was measured: ``|result - mean|² / |mean|²``; and, for
        host tensors, what was computed, in ms: ``encode_ms`` on the threads of backward, ``merge_ms`` between
        exchanges, ``decode_ms``; ``exposed_ms`` that backward waited behind its last bucket (plain hook).
        """
        if self.binding is not None:
            self.binding.synchronize()
        settle_errors(self.groups.values())
        world = self.ranks().size()
        dense = sum(g.numel * torch.empty(0, dtype=g.dtype).element_size() for g in self.groups.values())
        return {
            "steps": self.step,
            "dense_bytes": 2 * dense * (world - 1) // world,
            "error_norm": self.feedback.norm(),
            **(self.binding.stats() if self.binding is not None else {}),
        }

    # --- for dear.attach ---

    def check_new(self, model: DDP, caller: str) -> dict[str, Any]:
        """See :class:`dear.compression.Compressor`."""
        return checks.check_new(self, model, caller)

    def bind_to_schedule(self, site: Site) -> ScheduleBinding:
        """See :class:`dear.compression.Compressor`."""
        return ScheduleBinding(self, site)
