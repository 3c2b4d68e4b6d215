"""The base class of all compressors, and what one must say to be one."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from compress import ops
from compress._state import check_loaded, merge_states
from compress.exchange import Exchange, Steps
from compress.feedback import Feedback
from compress.generated import GeneratedCodec
from compress.group import Group, Member, in_parts
from dear import _C

NonFinite = Literal["raise", "skip", "propagate"]
COMPRESSIBLE = (torch.float32, torch.float16, torch.bfloat16)


class Compressor:
    """Shrinks what an all-reduce of gradients sends.

    A subclass says what is sent (:meth:`encode`), how it moves (:attr:`exchange`) and what it means
    (:meth:`decode`); buckets, collectives, error feedback across bucket rebuilds, bad gradients and saved state are
    taken care of here. The work falls in two phases, the reduce-scatter phase and the all-gather phase:

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
        start_step: the first so many steps are dense.
        min_compression_ratio: what would shrink by less than this stays dense.
        seed: of everything random; rank 0's counts.
        nonfinite: what a gradient with inf or NaN on any rank does, on all ranks alike. ``"raise"``: ``backward()``
            (under the DeAR schedule ``step()``) raises RuntimeError. ``"skip"``: every ``.grad`` is None after
            ``backward()`` (at ``step()``), so the optimizer's step changes nothing. ``"propagate"``: the gradients of
            that bucket become NaN, which a GradScaler sees, and skips the step. The last two keep a copy of the error
            feedback and put it back. In no case does anything non-finite get into the error feedback.
        process_group: whose ranks take part; the default group when None. :func:`compress.register` sets it.

    Gradients of other types than float32, float16 and bfloat16 (that is, float64) travel dense. Not thread-safe.
    One compressor serves one model.
    """

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "sum"
    #: By how much gradients shrink, roughly: what is sent little of may be fused more.
    usual_ratio: ClassVar[float] = 16.0
    #: Buckets of host tensors are cut into groups of about so many elements, so that one is encoded, merged or decoded
    #: while another is sent. None, where little is sent: one group for each bucket.
    part_numel: ClassVar[int | None] = None

    def __init__(
        self,
        *,
        error_feedback: bool = True,
        start_step: int = 0,
        min_compression_ratio: float = 1.0,
        seed: int = 0,
        nonfinite: NonFinite = "raise",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if start_step < 0:
            raise ValueError(f"start_step must be the number of dense steps, 0 or more, not {start_step!r}.")
        if not min_compression_ratio > 0:
            raise ValueError(f"min_compression_ratio must be a positive number, not {min_compression_ratio!r}.")
        if nonfinite not in ("raise", "skip", "propagate"):
            raise ValueError(f'nonfinite must be "raise", "skip" or "propagate", not {nonfinite!r}.')
        self.error_feedback = bool(error_feedback)
        self.start_step, self.min_compression_ratio = int(start_step), float(min_compression_ratio)
        self.seed, self.nonfinite, self.process_group = int(seed), nonfinite, process_group
        self._step = 0
        self.feedback = Feedback()
        self.groups: dict[tuple[str, ...], Group] = {}
        self.driver: Any = None  # whoever feeds this compressor: a compress.driver.Driver
        self._loaded: dict[str, Any] | None = None  # what load_state_dict was given and no group has taken yet
        self._measure = False

    @property
    def step(self) -> int:
        """How many steps have begun."""
        return self._step if self.driver is None else int(self.driver.pipeline.steps)

    @step.setter
    def step(self, value: int) -> None:
        self._step = value
        if self.driver is not None:
            self.driver.pipeline.steps = value

    @property
    def exchanges(self) -> int:
        """How many exchanges a compressed step takes; override it together with :meth:`compressed_steps`."""
        return 1 if self.exchange == "gather" else 2

    # --- what a subclass says ---

    def options(self) -> dict[str, Any]:
        """The subclass's own options, which must be equal on every rank and in a state that is loaded."""
        return {}

    def ratio(self, group: Group) -> float:
        """By how much the group shrinks: bytes of its float32 gradient, to bytes of its payload."""
        raise NotImplementedError(f"{type(self).__name__} must say how much a group shrinks: define ratio().")

    def prepare(self, group: Group) -> None:
        """Called once for each new group. The base class makes the error feedback: ``group.error`` [n], and for
        ``"owners"`` ``group.owner_error`` [this rank's shard]."""
        if not self.error_feedback:
            return
        group.error = self.feedback.allocate(group.members, group.device)
        group.feedback.append(group.error)
        if self.exchange == "owners":
            begin, end = self.owned_range(group)
            group.owner_error = self.feedback.allocate_owned(group.members, begin, end, group.device)
            group.feedback.append(group.owner_error)

    def encode(self, group: Group) -> Tensor:
        """The payload of ``group.gradient``; ``group.error``, if there is one, becomes what it does not say.

        ``"sum"``: flat, of a floating-point type. ``"owners"``: [ranks, m], ``"gather"``: flat; both of a type and
        length that can be viewed as int32.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it sends: define encode().")

    def merge(self, group: Group, received: Tensor) -> Tensor:
        """``"owners"`` only: what this rank, the owner of a shard, makes of every rank's row for it, [ranks, m]."""
        raise NotImplementedError(f"{type(self).__name__} must say what an owner sends: define merge().")

    def decode(self, group: Group, payload: Tensor) -> None:
        """Writes ``group.gradient`` [n] from the mean payload (``"sum"``), or from all ranks' rows [ranks, m]."""
        raise NotImplementedError(f"{type(self).__name__} must say what a payload means: define decode().")

    def named_state(self) -> dict[str, Any]:
        """State by parameter name that is equal on all ranks, to be saved."""
        return {}

    def load_named_state(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`named_state` gave."""

    def own_state(self) -> Any:
        """State of this rank alone, to be saved; it is lost on resuming at another world size."""
        return {}

    def load_own_state(self, state: Any) -> None:
        """Takes what :meth:`own_state` gave."""

    # --- helpers for subclasses ---

    def generator(self, name: str) -> torch.Generator:
        """A new generator on the host, the same on every rank, different for each name; pass step and all in it."""
        return torch.Generator().manual_seed((self.seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**63)

    def corrected(self, group: Group) -> Tensor:
        """``gradient + error`` [n] float32, where non-finite elements of the gradient were dropped and counted.

        It is ``group.error`` itself where there is one: subtract what is sent.
        """
        total = group.error
        if total is None:
            total = group.buffer("corrected", (group.numel,)).zero_()
        ops.error_correct(group.gradient, total, group.dropped)
        return total

    def shard_numel(self, group: Group) -> int:
        """Elements of the group that each rank owns; the last shards may be short or empty."""
        return ops.shard_numel(group.numel, group.world)

    def owned_range(self, group: Group) -> tuple[int, int]:
        """The elements of the group that this rank owns."""
        shard = self.shard_numel(group)
        return min(group.rank * shard, group.numel), min((group.rank + 1) * shard, group.numel)

    # --- for whoever drives it ---

    def compresses(self, group: Group) -> bool:
        """Whether the group is worth compressing, and of a type that can be."""
        return group.dtype in COMPRESSIBLE and self.ratio(group) >= self.min_compression_ratio

    def ranks(self) -> dist.ProcessGroup:
        """The process group that takes part."""
        if self.process_group is None:
            if not dist.is_initialized():
                raise RuntimeError("The default process group is not initialised: call init_process_group() first.")
            return c10d._get_default_group()
        return self.process_group

    def make_group(self, members: list[Member], dtype: torch.dtype, device: torch.device, label: str) -> Group:
        """The group of these parameters, with what is known about them: from other groups, or from a loaded state."""
        key = tuple(member.name for member in members)
        if key in self.groups:
            return self.groups[key]
        for old in [old for old in self.groups if not set(old).isdisjoint(key)]:
            del self.groups[old]  # its error feedback moves to the new group
        ranks = self.ranks()
        group = Group(members, dtype, device, ranks.rank(), ranks.size(), label)
        self.feedback.world = ranks.size()
        group.codec = _C.DenseCodec(group.device, group.rank, group.world)
        if self.compresses(group):
            self.prepare(group)
            codec = self.native(group) or GeneratedCodec(self, group).native()
            group.codec = _C.StartingCodec(group.device, group.codec, codec, self.start_step)
        self.groups[key] = group
        return group

    def planned(self, sizes: dict[str, int], device: torch.device) -> list[list[str]]:
        """How a bucket of these parameters (name: elements) is cut into groups: as a loaded state cut it, else by
        :attr:`part_numel`.

        DDP begins with one bucket and rebuilds it at the second step; a resumed run begins with the groups it had.
        """
        saved = self._loaded["layout"] if self._loaded else []
        parts = [part for part in saved if set(part) <= set(sizes)]
        if sorted(name for part in parts for name in part) == sorted(sizes):
            return parts
        if self.part_numel is None or device.type != "cpu":
            return [list(sizes)]
        return in_parts(sizes, self.part_numel)

    def loaded_names(self) -> set[str]:
        """The parameters of the state that was loaded, as long as it counts."""
        return {name for part in self._loaded["layout"] for name in part} if self._loaded else set()

    def steps(self, group: Group) -> Steps:
        """One step of a group alone, the one that began last: from this rank's ``group.gradient`` to the mean over the
        ranks, by way of exchanges, each of which must have been made before the next is asked for.

        What comes before the last exchange is the first phase, that exchange and what follows is the second.
        """
        gradient, step = group.gradient.view(-1), max(0, self.step - 1)
        group.codec.bind(gradient, gradient)
        for stage in range(group.codec.stages(step)):
            yield Exchange.of(group.codec.advance(step, stage), group.world)
        group.codec.advance(step, group.codec.stages(step))
        group.bad = group.codec.bad()

    def native(self, group: Group) -> _C.Codec | None:
        """The native codec of a group, which then does what encode, merge and decode would do; None where there is
        none."""
        return None

    def parts(self, group: Group) -> dict[str, Any]:
        """The arguments that native codecs have in common."""
        common = {"device": group.device, "rank": group.rank, "world": group.world}
        if self.exchange != "owners":
            return common
        begin, end = self.owned_range(group)
        return {**common, "owned": end - begin, "error": group.error, "owner_error": group.owner_error}

    def compressed_steps(self, group: Group) -> Steps:
        """The exchanges of a compressed step, by :attr:`exchange`; override it for any other plan."""
        if self.exchange == "sum":
            return self._sum_steps(group)
        return self._owner_steps(group) if self.exchange == "owners" else self._gather_steps(group)

    # The last element of every message says how many gradient elements were dropped as not finite: so all ranks know.

    def _sum_steps(self, group: Group) -> Steps:
        payload = self.encode(group)
        message = group.buffer("message", (payload.numel() + 1,), payload.dtype)
        message[:-1].copy_(payload)
        message[-1:].copy_(group.dropped)
        yield Exchange("reduce_scatter", message)
        yield Exchange("all_gather", message)
        group.bad = message[-1:]
        self.decode(group, message[:-1])

    def _owner_steps(self, group: Group) -> Steps:
        payload = self.encode(group)
        words = payload.view(group.world, -1).view(torch.int32)
        message = group.buffer("message", (group.world, words.shape[1] + 1), torch.int32)
        received = group.buffer("received", message.shape, torch.int32)
        message[:, :-1].copy_(words)
        message[:, -1:].copy_(group.dropped.expand(group.world, 1))
        yield Exchange("all_to_all", message, received)
        group.dropped.zero_()  # from here on what the owner has to complain of
        merged = self.merge(group, received[:, :-1].view(payload.dtype))
        yield from self._gather(group, merged, received[:, -1].sum() + group.dropped[0])

    def _gather_steps(self, group: Group) -> Steps:
        payload = self.encode(group)
        yield from self._gather(group, payload, group.dropped[0])

    def _gather(self, group: Group, payload: Tensor, dropped: Tensor) -> Steps:
        words = payload.view(-1).view(torch.int32)
        gathered = group.buffer("gathered", (group.world, words.numel() + 1), torch.int32)
        gathered[group.rank, :-1].copy_(words)
        gathered[group.rank, -1].copy_(dropped)
        yield Exchange("all_gather", gathered)
        group.bad = gathered[:, -1]
        self.decode(group, gathered[:, :-1].view(payload.dtype))

    # --- state ---

    def state_dict(self, gather: bool = False) -> dict[str, Any]:
        """What must be saved to go on: the step, the error feedback by parameter name, and the subclass's state.

        Error feedback differs by rank. Without ``gather`` this is the state of this rank alone, and each rank must
        save its own. With ``gather`` every rank must call it, and gets the states of all, ``{"ranks": [...]}``.
        Tensors are copies, flat in memory order.
        """
        ranks = self.ranks()
        self._settle()
        if self.groups or self._loaded is None:
            layout = [list(group.names) for group in self.groups.values()]
        else:
            layout = self._loaded["layout"]
        state = {
            "compressor": type(self).__name__,
            "options": self.options() | {"error_feedback": self.error_feedback},
            "step": self.step,
            "seed": self.seed,
            "rank": ranks.rank(),
            "world_size": ranks.size(),
            "layout": layout,
            **self.feedback.state(),
            "named": self.named_state(),
            "own": self.own_state(),
        }
        if not gather:
            return state
        states: list[dict[str, Any]] = [{}] * ranks.size()
        dist.all_gather_object(states, state, group=ranks)
        return {"ranks": states}

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Takes one rank's state, or all ranks' (as gathered, or as a list), between two steps.

        At the world size it was saved at, training goes on bit for bit: each rank takes its own. At another, which
        needs all ranks' states, old rank i's error feedback, its owner's error included, is added to new rank
        ``i % world_size``: the sum over the ranks is conserved.

        Raises:
            ValueError: it is not a state of such a compressor, or not enough of it; nothing has been changed. That
                it is another model's shows at the next step, on every rank.
        """
        ranks = self.ranks()
        self._settle()
        states = check_loaded(self, state, ranks.rank(), ranks.size())
        mine, self.feedback = merge_states(states, ranks.rank(), ranks.size())
        self.step, self.seed = mine["step"], mine["seed"]
        self.load_named_state(mine["named"])
        if mine["world_size"] == ranks.size():
            self.load_own_state(mine["own"])
        if self.driver is not None:
            self.driver.forget_groups()
        self.groups.clear()
        self._loaded = mine

    def _settle(self) -> None:
        """Nothing is in flight after this."""
        if self.driver is not None:
            self.driver.synchronize()

    # --- statistics ---

    def measure(self) -> None:
        """The next step also reduces the gradients densely, and :meth:`stats` will tell how far off the result was."""
        self._measure = self.driver is None
        if self.driver is not None:
            self.driver.measure_next()

    def take_measure(self) -> bool:
        """Whether :meth:`measure` was called before there was a driver, once."""
        measure, self._measure = self._measure, False
        return measure

    def stats(self) -> dict[str, float | int | None]:
        """Numbers of the last finished step on this rank; reads the device, so ask seldom.

        ``bytes_sent`` and ``dense_bytes`` (what a dense all-reduce of the same gradients sends); ``error_norm`` (of
        the error feedback); ``vnmse`` of the last step that was measured: ``|result - mean|² / |mean|²``; and, for
        host tensors, what was computed, in ms: ``encode_ms`` on the threads of backward, ``merge_ms`` between
        exchanges, ``decode_ms``; ``exposed_ms`` that backward waited behind its last bucket (plain hook).
        """
        self._settle()
        world = self.ranks().size()
        dense = sum(g.numel * torch.empty(0, dtype=g.dtype).element_size() for g in self.groups.values())
        return {
            "steps": self.step,
            "dense_bytes": 2 * dense * (world - 1) // world,
            "error_norm": self.feedback.norm(),
            **(self.driver.stats() if self.driver is not None else {}),
        }
