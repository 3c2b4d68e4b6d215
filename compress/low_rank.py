"""What ACP-SGD and both Power-SGDs share: matrices of equal shape in batches, their factors, and what stays dense."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress import ops, saved
from compress.choices import Assigned
from compress.compressor import Compressor
from compress.contract import COMPRESSIBLE
from compress.group import Group, Member
from compress.ranks import Rank, check_rank, rank_for
from compress.stepwise import Stepwise
from dear import _C

#: Of an element of a factor, without its share of a scale, by the type in which factors may travel.
FACTOR_BITS = {torch.bfloat16: 16, torch.float32: 32, torch.int8: 8}


@dataclass
class Batch:
    """All matrices of one shape and rank in a group: B of [n, m], and their factors."""

    members: list[Member]
    error: Tensor | None  # [B, n, m]
    factors: list[tuple[Tensor, Tensor]]  # P [B, n, r], Q [B, m, r]; by stage, each with a rank of its own


@dataclass
class Layout:
    """How a group is sent: batches of matrices, and the members that travel dense in the same message."""

    batches: list[Batch]
    dense: list[Member]

    @property
    def dense_numel(self) -> int:
        return sum(member.numel for member in self.dense)


class LowRank(Compressor):
    """Approximates each matrix M [n, m] by P Qᵀ. Vectors, exempt parameters, and matrices that shrink by less than
    ``min_compression_ratio``, travel dense in the same message. Tensors of more dimensions are viewed as matrices.

    Args:
        rank: columns of P and Q, at most 256 and at most the smaller side. A whole number, a fraction of the smaller
            side, ``"4x"`` (the largest that sends at least 4 times fewer elements than the matrix has, on average), or
            ``"auto"``; or a list of (step, rank), such as ``[(0, 32), (1000, 8)]``: a matrix that would stay
            dense under any of them does so throughout. Smaller compresses more.
        rank_of: the rank by parameter, which counts in place of ``rank``: a dict from names, modules' names or patterns
            to ranks, or a callable of name and parameter that returns a rank, or None for ``rank``.
        factor_dtype: of the factors on the wire. In ``torch.bfloat16`` they take half the bytes of ``torch.float32``,
            in ``torch.int8`` (with a scale for each 128 elements) a quarter; owners sum them in float32, and what
            rounding loses stays in the error feedback. What travels dense is float32 in any case.
    """

    carries_exempt: ClassVar[bool] = True
    #: The fraction of the smaller side that rank="auto" stands for.
    auto: ClassVar[float]

    def __init__(
        self,
        rank: Rank | Sequence[tuple[int, Rank]] = 4,
        *,
        rank_of: Mapping[str, Rank] | Callable[[str, Tensor], Rank | None] | None = None,
        factor_dtype: torch.dtype = torch.bfloat16,
        min_compression_ratio: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(min_compression_ratio=min_compression_ratio, **options)
        if factor_dtype not in FACTOR_BITS:
            raise ValueError(f"factor_dtype must be torch.bfloat16, torch.float32 or torch.int8, not {factor_dtype!r}.")
        self.factor_dtype = factor_dtype
        self.rank = rank
        self.rank_of = Assigned(rank_of, "rank_of", lambda one: check_rank(one, "rank_of"))
        self.patterns["rank_of"] = self.rank_of.patterns
        self._own: dict[str, Rank] = {}  # what rank_of says, by name
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}  # by name and stage: P, Q; views of the batches

    @property
    def rank(self) -> Rank | Sequence[tuple[int, Rank]]:
        """As it was given. It may be assigned between two backward passes, on every rank alike: the next one counts."""
        return self._rank

    @rank.setter
    def rank(self, rank: Rank | Sequence[tuple[int, Rank]]) -> None:
        stages: Stepwise[Rank] = Stepwise(rank, "rank", check_rank)

        def apply() -> None:
            self._rank, self.stages = rank, stages

        saved.change(self, "rank", apply)

    def options(self) -> dict[str, Any]:
        said = {"rank": self.stages.said, "rank_of": self.rank_of.by_pattern}
        return said | {"factor_dtype": str(self.factor_dtype)}

    @property
    def all_to_alls(self) -> tuple[int, ...]:
        return tuple(range(0, self.exchanges - 1, 2)) if self._rounds else ()  # the first of each two

    @property
    def _rounds(self) -> bool:
        return self.factor_dtype != torch.float32

    def choose(self, params: Mapping[str, Tensor]) -> dict[str, Any]:
        own = {name: rank for name, param in params.items() if (rank := self.rank_of(name, param)) is not None}
        self._own.update(own)
        return super().choose(params) | {"the ranks of a bucket's parameters": own}

    @abstractmethod
    def cost(self, rows: int, columns: int, rank: int) -> float:
        """Elements sent for a matrix in a step, on average."""

    @abstractmethod
    def codec(self, arguments: dict[str, Any]) -> _C.Codec:
        """The native codec of a group, for one stage."""

    def _ranks_of(self, member: Member) -> tuple[int, ...]:
        """The ranks under which a member is compressed, by stage; empty where it stays dense."""
        wanted = [rank for _, rank in self.stages.values]
        if member.name in self._own:
            wanted = [self._own[member.name]] * len(wanted)
        each = self.cost(member.rows, member.columns, 1)
        ranks = tuple(rank_for(rank, member.rows, member.columns, self.auto, each) for rank in wanted)
        worth = member.numel >= self.min_compression_ratio * self._sent(member, max(ranks))
        kept = worth or member.name in self.feedback.begun
        return ranks if member.columns > 1 and member.name not in self.exempted and kept else ()

    def _sent(self, member: Member, rank: int) -> float:
        """The same in words of 32 bits."""
        return self.cost(member.rows, member.columns, rank) * FACTOR_BITS[self.factor_dtype] / 32

    def ratio(self, group: Group) -> float:
        rows, columns, dense = self._elements(group)
        each = self.cost(1, 0, 1)  # of the two messages, how many are sent in a step
        return group.numel / (each * (self._words(rows, group.world) + self._words(columns, group.world)) + dense)

    def _elements(self, group: Group) -> tuple[int, int, int]:
        """Of all P, of all Q, and of what stays dense; the most of any step."""
        rows = columns = dense = 0
        for member in group.members:
            if ranks := self._ranks_of(member):
                rows, columns = rows + member.rows * max(ranks), columns + member.columns * max(ranks)
            else:
                dense += member.numel
        return rows, columns, dense

    def _words(self, elements: int, world: int) -> float:
        """Of 32 bits, in a message of so many elements of factors."""
        if self.factor_dtype != torch.int8:
            return elements * FACTOR_BITS[self.factor_dtype] / 32
        shard = ops.quantize_shard_numel(-(-elements // world))  # so large that few factors are padded much
        return world * ops.quantize_payload_numel(shard)

    def compresses(self, group: Group) -> bool:
        return group.dtype in COMPRESSIBLE and any(self._ranks_of(member) for member in group.members)

    def prepare(self, group: Group) -> None:
        group.private = self._lay_out(group, self._make_batch)

    def _lay_out(self, group: Group, make_batch: Callable[[Group, list[Member], tuple[int, ...]], Batch]) -> Layout:
        alike: dict[tuple[int, int, tuple[int, ...]], list[Member]] = {}
        for member in group.members:
            if ranks := self._ranks_of(member):
                alike.setdefault((member.rows, member.columns, ranks), []).append(member)
        batches = [make_batch(group, members, ranks) for (_, _, ranks), members in alike.items()]
        return Layout(batches, [member for member in group.members if not self._ranks_of(member)])

    def _make_batch(self, group: Group, members: list[Member], ranks: tuple[int, ...]) -> Batch:
        (first, *_), count = members, len(members)
        factors = make_factors(group, members, ranks)
        step = self._next_step()
        before, now = self._stage_before(step), self.stages.index(step)
        started = step >= self.start.native.step
        for index, member in enumerate(members):
            known = self._factors.get(member.name)
            own = [(p[index], q[index]) for p, q in factors]
            for stage, (_, q) in enumerate(own):
                q.copy_(torch.randn(q.shape, generator=self.generator(member.name)))
                if known and started and stage == now:  # later ones follow their predecessor when they begin
                    for new, old in zip(own[stage], known[min(before, len(known) - 1)], strict=True):
                        shared = min(new.shape[1], old.shape[1])
                        new[:, :shared].copy_(old[:, :shared])
            self._factors[member.name] = own
        error = None
        if self.error_feedback:
            error = self.feedback.allocate(members, group.device).view(count, first.rows, first.columns)
            group.feedback.append(error)
        return Batch(members, error, factors)

    def _next_step(self) -> int:
        """The step in which a group that is made now is sent first."""
        between = self.binding is not None and self.binding.between_passes
        return self.step if between else self.step - 1

    def _stage_before(self, step: int) -> int:
        """The stage whose factors a step follows: that of the step before; of the first compressed step its own, which
        learned from the last dense one."""
        return self.stages.index(max(step - 1, self.start.native.step))

    def natives(self, group: Group) -> list[tuple[int, _C.Codec]]:
        return [
            (begin, self.codec(self._codec_arguments(group, stage)))
            for stage, (begin, _) in enumerate(self.stages.values)
        ]

    def _codec_arguments(self, group: Group, stage: int) -> dict[str, Any]:
        layout: Layout = group.private
        batches = []
        for batch in layout.batches:
            starts = torch.tensor([member.start for member in batch.members], device=group.device)
            p, q = batch.factors[stage]
            batches.append(_C.MatrixBatch(starts=starts, error=batch.error, p=p, q=q))
        segments, position = [], 0
        for member in layout.dense:
            segments.append([member.start, member.numel, position])
            position += member.numel
        return {
            **self.codec_arguments(group),
            "batches": batches,
            "segments": torch.tensor(segments, dtype=torch.int64, device=group.device).view(-1, 3),
            "dense_numel": layout.dense_numel,
            "wire": self.factor_dtype if self._rounds else None,
        }

    # --- state: the factors are the same on all ranks ---

    def named_state(self) -> dict[str, Any]:
        """The factors that the next step follows."""
        stage, state = self._stage_before(self.step), dict[str, Any]()
        for name, known in self._factors.items():
            p, q = known[min(stage, len(known) - 1)]
            state[name] = (p.clone(), q.clone())
        return state

    def load_named_state(self, state: dict[str, Any]) -> None:
        self._factors = checked_factors(state)


def make_factors(group: Group, members: list[Member], ranks: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Zeros for the factors of members of one shape, by stage; see :class:`Batch`."""
    (first, *_), count = members, len(members)
    return [
        (
            torch.zeros(count, first.rows, rank, device=group.device),
            torch.zeros(count, first.columns, rank, device=group.device),
        )
        for rank in ranks
    ]


def checked_factors(state: dict[str, Any]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Copies of the factors by name that were saved, each of one stage.

    Raises:
        ValueError: they are none.
    """
    for name, factors in state.items():
        if not (isinstance(factors, Sequence) and len(factors) == 2 and all(map(_is_matrix, factors))):
            raise ValueError(
                f"The compressor's state is damaged: the factors of {name} must be two float32 matrices; load what "
                "state_dict() returned."
            )
    return {name: [(p.clone(), q.clone())] for name, (p, q) in state.items()}


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() == 2
