"""Records what one worker computes during a few steps, next to what the engine says moves at the same time."""

import time
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from benchmarks.gpt import GPT, language_loss
from benchmarks.strategies import Trainer

STEPS = 3  # one to fill the pipeline, one to show, one whose forward receives what the shown one sent


class ComputeMarks:
    """Marks where each part of a GPT step begins; a part lasts until the next mark.

    Forward parts are marked by module hooks. Backward parts by hooks on the parts' outputs: the gradient of an output
    arrives when the backward of that part begins. (Module backward hooks would change the graph that is measured.)
    """

    def __init__(self, net: GPT) -> None:
        self.marks: list[dict[str, Any]] = []
        self.step = 0
        self._handles: list[RemovableHandle] = []
        for number, block in enumerate(net.blocks, start=1):
            self._watch(block, f"block {number}", "embedding" if number == 1 else f"block {number - 1}")
        self._watch(net.norm, "head", f"block {len(net.blocks)}")

    def _watch(self, module: nn.Module, name: str, before: str) -> None:
        def entered(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.mark("forward", name)
            inputs[0].register_hook(lambda gradient: self.mark("backward", before))

        self._handles.append(module.register_forward_pre_hook(entered))

    def mark(self, phase: str, name: str) -> None:
        self.marks.append({"step": self.step, "phase": phase, "name": name, "start": time.perf_counter_ns()})

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def spans(self) -> list[dict[str, Any]]:
        """The parts with their ends, in order, the marks that only end a step left out."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [{**mark, "end": after["start"]} for mark, after in pairs if mark["phase"] != "end"]


def record(trainer: Trainer, net: GPT, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Trains one step per batch under trace; times are perf_counter_ns.

    Returns {"compute": spans with step, phase, name, start, end; "lanes": the engine's own spans}.
    """
    compute = ComputeMarks(net)
    trainer.engine.start_trace()
    try:
        for compute.step, (inputs, targets) in enumerate(batches):
            compute.mark("forward", "embedding")
            loss = language_loss(trainer.model(inputs), targets)
            compute.mark("backward", "head")
            loss.backward()
            compute.mark("update", "update")
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            compute.mark("end", "")
        trainer.synchronize()
    finally:
        compute.remove()
        lanes = trainer.engine.stop_trace()
    return {"compute": compute.spans(), "lanes": lanes}
