"""Records what one worker computes during a few steps, next to what moves at the same time."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .trainer import Trainer

# One to fill the pipeline, several of which the most typical is shown, one whose forward receives what the last sent.
STEPS = 7


class ComputeMarks:
    """Marks where each part of a step begins; a part lasts until the next mark, so what lies between two counts to the
    first of them.

    Forward parts are marked by module hooks. Backward parts by hooks on the parts' outputs: the gradient of an output
    arrives when the backward of that part begins. (Module backward hooks would change the graph that is measured.)

    parts: (name, module) pairs in the order of the forward pass; two may have the same name.
    """

    def __init__(self, parts: Iterable[tuple[str, nn.Module]]) -> None:
        self.marks: list[dict[str, Any]] = []
        self.step = 0
        self._handles: list[RemovableHandle] = []
        for name, module in parts:
            self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.mark("forward", name)))
            self._handles.append(module.register_forward_hook(partial(self._left, name)))

    def _left(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = (each for each in tree_leaves(output) if isinstance(each, Tensor) and each.requires_grad)
        if (first := next(outputs, None)) is not None:
            first.register_hook(lambda gradient: self.mark("backward", name))

    def mark(self, phase: str, name: str) -> None:
        self.marks.append({"step": self.step, "phase": phase, "name": name, "start": time.perf_counter_ns()})

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def spans(self) -> list[dict[str, Any]]:
        """The parts with their ends, in order, the marks that only end a step left out."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [{**mark, "end": after["start"]} for mark, after in pairs if mark["phase"] != "end"]


def record(
    trainer: Trainer,
    parts: Iterable[tuple[str, nn.Module]],
    batches: list[tuple[Tensor, Tensor]],
    tracer: Any = None,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains one step per batch under trace; times are perf_counter_ns.

    `tracer` has start_trace() and stop_trace(), and sees what moves; without one, exchanges are not recorded.
    `after_step` is called between two steps and is in the time of neither. The first part's forward begins with the
    step, and the last part's backward with the backward pass.

    Returns {"compute": spans with step, phase, name, start, end; "lanes": spans with lane, name, start, end}.
    """
    parts = list(parts)
    first, last = parts[0][0], parts[-1][0]
    compute = ComputeMarks(parts)
    if tracer is not None:
        tracer.start_trace()
    try:
        for compute.step, (inputs, targets) in enumerate(batches):
            compute.mark("forward", first)
            loss = trainer.loss(trainer.model(inputs), targets)
            compute.mark("backward", last)
            loss.backward()
            compute.mark("update", "update")
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            compute.mark("end", "")
            after_step()
        trainer.synchronize()
    finally:
        compute.remove()
        lanes: Any = tracer.stop_trace() if tracer is not None else None
    return {"compute": compute.spans(), "lanes": lanes}
