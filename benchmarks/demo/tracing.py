"""What the demo's pictures show of a step: the parts of the GPT, and how DDP's buckets move."""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..training.gpt import GPT


def gpt_parts(net: GPT) -> list[tuple[str, nn.Module]]:
    """The parts that the pictures show."""
    blocks = [(f"block {number}", block) for number, block in enumerate(net.blocks, start=1)]
    return [("embedding", net.bytes), *blocks, ("head", net.norm)]


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

    def wait(self, spans: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
        """Once the last bucket of a step is handed over nothing is left to compute: from there backward only waits."""
        end = max(span["end"] for span in spans if span["step"] == step and span["phase"] == "backward")
        start = max((bucket["handed"] for bucket in self.buckets if bucket["handed"] < end), default=end)
        return {"lane": "wait", "name": "all-reduce", "start": start, "end": end}
