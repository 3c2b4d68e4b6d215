"""What ACP-SGD and Power-SGD share: matrices of equal shape in batches, their factors, and what stays dense."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.compressor import Compressor
from compress.contract import COMPRESSIBLE
from compress.group import Group, Member
from dear import _C


@dataclass
class Batch:
    """All matrices of one shape in a group: B of [n, m], and their factors of rank r."""

    members: list[Member]
    error: Tensor | None  # [B, n, m]
    p: Tensor  # [B, n, r]
    q: Tensor  # [B, m, r]


@dataclass
class Layout:
    """How a group is sent: batches of matrices, and the members that travel dense in the same message."""

    batches: list[Batch]
    dense: list[Member]

    @property
    def dense_numel(self) -> int:
        return sum(member.numel for member in self.dense)


class LowRank(Compressor):
    """Approximates each matrix M [n, m] by P Qᵀ. Vectors, and matrices that shrink by less than
    ``min_compression_ratio``, travel dense in the same message. Tensors of more dimensions are viewed as matrices."""

    def __init__(self, rank: int = 4, *, min_compression_ratio: float = 2.0, **options: Any) -> None:
        super().__init__(min_compression_ratio=min_compression_ratio, **options)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 256:
            raise ValueError(f"rank must be a whole number from 1 to 256, not {rank!r}.")
        self.rank = rank
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}  # by name: P, Q; views of the batches

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @abstractmethod
    def cost(self, rows: int, columns: int, rank: int) -> float:
        """Elements sent for a matrix in a step, on average."""

    def _rank_of(self, member: Member) -> int:
        """The rank under which a member is compressed; 0 where it stays dense."""
        rank = min(self.rank, member.rows, member.columns)
        worth = member.numel >= self.min_compression_ratio * self.cost(member.rows, member.columns, rank)
        return rank if member.columns > 1 and worth else 0

    def ratio(self, group: Group) -> float:
        sent = 0.0
        for member in group.members:
            rank = self._rank_of(member)
            sent += self.cost(member.rows, member.columns, rank) if rank else member.numel
        return group.numel / sent

    def compresses(self, group: Group) -> bool:
        return group.dtype in COMPRESSIBLE and any(self._rank_of(member) for member in group.members)

    def prepare(self, group: Group) -> None:
        shapes: dict[tuple[int, int], list[Member]] = {}
        for member in group.members:
            if self._rank_of(member):
                shapes.setdefault((member.rows, member.columns), []).append(member)
        batches = [self._make_batch(group, members) for members in shapes.values()]
        group.private = Layout(batches, [member for member in group.members if not self._rank_of(member)])

    def _make_batch(self, group: Group, members: list[Member]) -> Batch:
        (first, *_), count = members, len(members)
        rank = self._rank_of(first)
        p = torch.zeros(count, first.rows, rank, device=group.device)
        q = torch.zeros(count, first.columns, rank, device=group.device)
        for index, member in enumerate(members):
            if member.name in self._factors:
                for factor, old in zip((p, q), self._factors[member.name], strict=True):
                    factor[index].copy_(old)
            else:
                q[index].copy_(torch.randn(first.columns, rank, generator=self.generator(member.name)))
            self._factors[member.name] = (p[index], q[index])
        error = None
        if self.error_feedback:
            error = self.feedback.allocate(members, group.device).view(count, first.rows, first.columns)
            group.feedback.append(error)
        return Batch(members, error, p, q)

    def codec_arguments(self, group: Group) -> dict[str, Any]:
        layout: Layout = group.private
        batches = []
        for batch in layout.batches:
            starts = torch.tensor([member.start for member in batch.members], device=group.device)
            batches.append(_C.MatrixBatch(starts=starts, error=batch.error, p=batch.p, q=batch.q))
        segments, position = [], 0
        for member in layout.dense:
            segments.append([member.start, member.numel, position])
            position += member.numel
        return {
            **super().codec_arguments(group),
            "batches": batches,
            "segments": torch.tensor(segments, dtype=torch.int64, device=group.device).view(-1, 3),
            "dense_numel": layout.dense_numel,
        }

    # --- state: the factors are the same on all ranks ---

    def named_state(self) -> dict[str, Any]:
        return {name: (p.clone(), q.clone()) for name, (p, q) in self._factors.items()}

    def load_named_state(self, state: dict[str, Any]) -> None:
        self._factors = {name: (p.clone(), q.clone()) for name, (p, q) in state.items()}
