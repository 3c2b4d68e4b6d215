"""Records what one worker computes during a few steps, next to what moves at the same time."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .gpt import GPT
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


class AllReduceTrace:
    """Plain DDP with a communication hook that does what DDP does without one, and notes when.

    Same calls as the engine's trace: start_trace, stop_trace. A bucket is taken to move from when it is handed over,
    or from when the bucket before it is done if that is later, until it is done. Register before the first step.
    """

    def __init__(self, model: DistributedDataParallel, group: dist.ProcessGroup) -> None:
        self.group = group
        self.buckets: list[dict[str, int]] = []
        model.register_comm_hook(self, AllReduceTrace.hook)

    @staticmethod
    def hook(trace: "AllReduceTrace", bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        note = {"handed": time.perf_counter_ns()}
        trace.buckets.append(note)
        gradients = bucket.buffer().div_(trace.group.size())

        def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            note["done"] = time.perf_counter_ns()
            return future.value()[0]

        work = dist.all_reduce(gradients, group=trace.group, async_op=True)
        return work.get_future().then(done)

    def start_trace(self) -> None:
        self.buckets.clear()

    def stop_trace(self) -> list[dict[str, Any]]:
        lanes, free = [], 0
        for number, bucket in enumerate(self.buckets):
            start = max(bucket["handed"], free)
            free = max(bucket["done"], start)
            lanes.append({"lane": "all-reduce", "name": f"bucket {number}", "start": start, "end": free})
        return lanes


def gpt_parts(net: GPT) -> list[tuple[str, nn.Module]]:
    """The parts that the pictures show."""
    blocks = [(f"block {number}", block) for number, block in enumerate(net.blocks, start=1)]
    return [("embedding", net.bytes), *blocks, ("head", net.norm)]


def record(
    trainer: Trainer,
    parts: Iterable[tuple[str, nn.Module]],
    batches: list[tuple[Tensor, Tensor]],
    tracer: Any = None,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains one step per batch under trace; times are perf_counter_ns.

    `tracer` has start_trace() and stop_trace(), and sees what moves; without one nobody does. `after_step` is called
    between two steps, on nobody's account.
    The first part's forward begins with the step, and the last part's backward with the backward pass.

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
    spans = compute.spans()
    if isinstance(tracer, AllReduceTrace):
        lanes += [_ddp_wait(spans, tracer, step) for step in range(len(batches))]
    return {"compute": spans, "lanes": lanes}


def _ddp_wait(spans: list[dict[str, Any]], tracer: AllReduceTrace, step: int) -> dict[str, Any]:
    """Once the last bucket of a step is handed over nothing is left to compute: from there backward only waits."""
    end = max(span["end"] for span in spans if span["step"] == step and span["phase"] == "backward")
    start = max((bucket["handed"] for bucket in tracer.buckets if bucket["handed"] < end), default=end)
    return {"lane": "wait", "name": "all-reduce", "start": start, "end": end}
