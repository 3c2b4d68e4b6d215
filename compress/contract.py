"""What a compressor must say to be one: the contract of a subclass, and helpers to keep it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from compress import ops, patterns
from compress.choices import Selected, Selection
from compress.exchange import Steps
from compress.feedback import Feedback
from compress.group import Group
from compress.read_once import ReadOnce, options_of
from compress.start import Start
from compress.stateful import Stateful
from dear import _C

NonFinite = Literal["raise", "skip", "propagate"]
COMPRESSIBLE = (torch.float32, torch.float16, torch.bfloat16)


class Contract(Stateful, ReadOnce):
    """The part of :class:`compress.Compressor` that its subclasses define. See there for the arguments."""

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "sum"
    #: By how much gradients shrink, roughly: what is sent little of may be fused more.
    usual_ratio: ClassVar[float] = 16.0
    #: Buckets of host tensors are cut into groups of about so many elements, so that one is encoded, merged or decoded
    #: while another is sent. None, where little is sent: one group for each bucket.
    part_numel: ClassVar[int | None] = None
    #: Whether exempt parameters travel in the messages of the others, rather than in a group of their own.
    carries_exempt: ClassVar[bool] = False

    def __init__(
        self,
        *,
        error_feedback: bool = True,
        start_step: int | Literal["warmup"] = 0,
        exempt: Selection = (),
        min_compression_ratio: float = 1.0,
        seed: int = 0,
        nonfinite: NonFinite = "raise",
        process_group: dist.ProcessGroup | None = None,
        **unknown: Any,
    ) -> None:
        kind: Any = type(self)
        if unknown:
            raise TypeError(
                f"{kind.__name__} has no option {next(iter(unknown))}: it takes {', '.join(options_of(kind))}."
            )
        if not isinstance(error_feedback, bool):
            raise ValueError(f"error_feedback must be True or False, not {error_feedback!r}.")
        if not min_compression_ratio > 0:
            raise ValueError(f"min_compression_ratio must be a positive number, not {min_compression_ratio!r}.")
        if nonfinite not in ("raise", "skip", "propagate"):
            raise ValueError(f'nonfinite must be "raise", "skip" or "propagate", not {nonfinite!r}.')
        self.error_feedback = error_feedback
        self.start_step, self.min_compression_ratio = start_step, float(min_compression_ratio)
        self.start = Start(start_step)
        self.exempt = Selected(exempt, "exempt")
        self.patterns = {"exempt": self.exempt.patterns}  # by option: each must match a parameter
        self.exempted: set[str] = set()  # of the parameters seen so far
        self.seed, self.nonfinite, self.process_group = int(seed), nonfinite, process_group
        self.feedback = Feedback()
        self.groups: dict[tuple[str, ...], Group] = {}
        self.binding: Any = None  # what feeds this compressor, once it serves a model: a compress.binding.Binding
        self.levels: Any = None  # a compress.two_levels.TwoLevels, where it works between nodes alone
        self.measure_first = False  # measure() was called before there was a binding
        self.initial_step = 0  # without a binding, which counts them
        self.loaded: dict[str, Any] | None = None  # what load_state_dict() was given and no group has taken yet
        self.assigned: dict[str, Any] = {}  # what options were before they were assigned, here or in a state's run

    # --- the contract: what a subclass says ---

    def options(self) -> dict[str, Any]:
        """The subclass's own options, which must be equal on every rank and in a state that is loaded."""
        return {}

    def choose(self, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """Notes what the options say about these parameters; returns what must be equal on every rank, by what it is
        called in a sentence."""
        exempt = [name for name, param in params.items() if self.exempt(name, param)]
        self.exempted.update(exempt)
        return {"the exempt parameters of a bucket": exempt}

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

    def prepare_reader(self, group: Group) -> None:
        """Called in its place for a group that another place of the node compresses and this one only reads."""
        if self.error_feedback:
            self.feedback.begun.update(group.names)

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

    # --- the contract, for what no ``exchange`` describes ---

    @property
    def exchanges(self) -> int:
        """How many exchanges a compressed step takes; override it together with :meth:`compressed_steps`."""
        return 1 if self.exchange == "gather" else 2

    @property
    def all_to_alls(self) -> tuple[int, ...]:
        """Which of them are all-to-alls; in Python only the first can be."""
        return (0,) if self.exchange == "owners" else ()

    def compressed_steps(self, group: Group) -> Steps:
        """The exchanges of a compressed step, by :attr:`exchange`; override it for any other sequence."""
        return patterns.steps(self, group)

    def natives(self, group: Group) -> list[tuple[int, _C.Codec]]:
        """The native codecs of a group, which then do what encode, merge and decode would do, and the steps from which
        they count, the first from step 0; empty where there are none."""
        return []

    def before_start(self, group: Group) -> _C.Codec:
        """The native codec of the steps before ``start_step``."""
        return _C.DenseCodec(group.device, group.rank, group.world)

    def compresses(self, group: Group) -> bool:
        """Whether the group is worth compressing, and of a type that can be."""
        return group.dtype in COMPRESSIBLE and self.ratio(group) >= self.min_compression_ratio

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

    def codec_arguments(self, group: Group) -> dict[str, Any]:
        """The arguments that native codecs have in common."""
        common = {"device": group.device, "rank": group.rank, "world": group.world}
        if self.exchange != "owners":
            return common
        begin, end = self.owned_range(group)
        return {**common, "owned": end - begin, "error": group.error, "owner_error": group.owner_error}

    # --- for whoever drives it ---

    @property
    def step(self) -> int:
        """How many steps have begun."""
        return self.initial_step if self.binding is None else int(self.binding.steps)

    def ranks(self) -> dist.ProcessGroup:
        """The process group that takes part."""
        if self.process_group is None:
            if not dist.is_initialized():
                raise RuntimeError("The default process group is not initialised: call init_process_group() first.")
            return c10d._get_default_group()
        return self.process_group
