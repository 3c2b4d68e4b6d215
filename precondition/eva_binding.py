"""Eva and its like at work: the binding of one preconditioner to one model. See Note [Small exchanges]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from dear.preconditioning import Param, Run, Site, Team
from precondition import eva_parts
from precondition._plain import PLAIN
from precondition.eva_exchange import Average, Exchanges
from precondition.eva_means import Means, Running, Shaped
from precondition.eva_parts import Rectangle
from precondition.eva_rank_one import RankOneStep


class RankOneBinding:
    """See the module; the interface is that of :class:`dear.preconditioning.Binding`.

    means: what captures them from these layers; None where gradients alone tell.
    """

    teams: Sequence[Team] = ()  # any rank may have any part of a gradient

    def __init__(
        self, preconditioner: Any, site: Site, layers: Sequence[Shaped], running: Running, means: Means | None
    ) -> None:
        self.preconditioner = preconditioner  # a RankOnePreconditioner
        self._site, self._layers = site, list(layers)
        self._running, self._means = running, means
        self._place: dict[Param, tuple[int, bool]] = {}  # of a parameter: its layer, and whether it is the bias
        for index, layer in enumerate(layers):
            self._place[layer.weight] = index, False
            if layer.bias is not None:
                self._place[layer.bias] = index, True
        self._params = set(self._place)
        # The rectangles of the last step's runs, which hold their memory, and of this one's: most often the same.
        self._former: dict[tuple[Any, ...], list[Rectangle]] = {}
        self._parts: dict[tuple[Any, ...], list[Rectangle]] = {}
        self._exchanges = Exchanges(site.gather_lane, site.algorithm)
        self._message: Average | None = None  # of the last backward pass
        self._step: RankOneStep | None = None
        if means is not None:
            means.watch()

    def assigned(self, owner: dict[Param, int]) -> None:
        """Nobody owns a team here."""

    def backward_ended(self) -> None:
        """The mean vectors set out."""
        if self._means is None:
            return
        if self._message is not None:  # of a pass that no step has used: it is in this one's message, or was given up
            self._exchanges.wait(self._message)
        self._message = self._exchanges.average(self._means.message())

    def dropped(self) -> None:
        """What was captured is forgotten."""
        if self._means is not None:
            self._means.forget()

    def begin(self) -> None:
        """The mean vectors are waited for."""
        if self._means is not None and self._message is not None:
            used, columns, rows = self._means.parts(self._exchanges.wait(self._message))
            self._running.update(used, columns, rows, self.preconditioner.settings.factor_decay)
            self._message = None
            self._means.forget()
        self._step = self.preconditioner.new_step(self._running)

    def precondition(self, runs: Sequence[Run]) -> None:
        """Looks at averaged gradients; they are changed at the end."""
        assert self._step is not None
        parts: list[Rectangle] = []
        for run in runs:
            key = id(run.param), run.start, run.stop, run.grad.data_ptr(), run.grad.dtype
            found = self._former.get(key)
            self._parts[key] = found = list(self._rectangles(run)) if found is None else found
            parts += found
        self._step.take(parts)

    def end(self) -> set[Param]:
        """Adds up what the ranks have seen, and changes all gradients."""
        assert self._step is not None
        step, self._step = self._step, None
        step.finish(self._learning_rates(), self._total)
        # On plain DDP gradients come in other memory at each step, and the last step's must not stay.
        self._former, self._parts = {} if self._site.update == PLAIN else self._parts, {}
        return self._params

    def stats(self) -> dict[str, Any]:
        """How many layers are preconditioned, and what this rank has sent for it."""
        sent = self._exchanges.bytes_sent
        return {"preconditioned_layers": len(self._layers), "preconditioner_bytes_sent": sent}

    def release(self) -> None:
        """Takes the hooks off the model."""
        if self._message is not None:
            self._exchanges.wait(self._message)
            self._message = None
        self.preconditioner.released()
        if self._means is not None:
            self._means.release()

    def _total(self, values: Tensor) -> Tensor:
        if self._site.update == PLAIN:  # every rank has whole gradients
            return values
        return self._exchanges.total(values)

    def _rectangles(self, run: Run) -> Iterator[Rectangle]:
        if run.param not in self._place or run.start == run.stop:
            return
        layer, is_bias = self._place[run.param]
        flat = run.grad.as_strided((run.stop - run.start,), (1,))  # as it lies in memory
        if is_bias:
            yield eva_parts.cut_bias(flat, run.start, layer, self._running.vectors)
        else:
            yield from eva_parts.cut_weight(flat, run.start, layer, self._running.vectors)

    def _learning_rates(self) -> list[float]:
        """Of each layer, as they stand now."""
        groups = [group for optimizer in self._site.optimizers for group in optimizer.param_groups]
        rates = {id(param): group["lr"] for group in groups for param in group["params"]}
        return [float(rates.get(id(layer.weight), 0.0)) for layer in self._layers]
