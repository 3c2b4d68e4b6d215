"""A timeline of a few training steps in Chrome's trace format, which Perfetto reads, too.

    tracer = planner.tracing.Tracer(engine, model, "trace.json")  # after dear.attach()
    ...                                                       # train: it stops by itself after a few steps

Compute is shown by the model's top-level parts, lanes by exchange, waits and updates as the engine notes them.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import timeline

Span = dict[str, Any]


class Tracer:
    """Records ``steps`` steps of ``model`` (the DDP module) after ``skip``, then writes the file.

    A step begins with a forward pass in training mode. Every rank makes one; each writes its own file, the rank before
    the suffix, except rank 0.
    """

    def __init__(self, engine: Any, model: nn.Module, path: str | Path, steps: int = 5, skip: int = 3) -> None:
        check_steps(steps, skip)
        self.path = Path(path)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if self.rank:
            self.path = self.path.with_suffix(f".rank{self.rank}{self.path.suffix}")
        self.spans: list[Span] = []  # once there are some
        self._engine, self._begin, self._end, self._step = engine, skip, skip + steps, 0
        self._marks: list[tuple[int, str]] = []  # when a part of the step began, and what; "" ends one
        self._handles = [model.register_forward_pre_hook(self._forward)]
        inner = getattr(model, "module", None)
        net = inner if isinstance(inner, nn.Module) else model
        for name, part in _parts(net):
            self._handles.append(part.register_forward_pre_hook(partial(self._part, name)))
            self._handles.append(part.register_forward_hook(partial(self._left, name)))

    @property
    def done(self) -> bool:
        """Whether the file is written."""
        return self._step > self._end

    def _recording(self) -> bool:
        return self._begin < self._step <= self._end

    def _forward(self, model: nn.Module, inputs: Any) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        self._step += 1
        if self._step == self._begin + 1:
            self._engine.start_trace()
        if self._recording():
            self._mark("forward begins")
        elif self._step == self._end + 1:
            self._mark("")
            self.write()

    def _part(self, name: str, module: nn.Module, inputs: Any) -> None:
        if self._recording():
            self._mark(f"forward {name}")

    def _left(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """The gradient of a part's output comes when the part's backward begins."""
        first = next((each for each in _tensors(output) if each.requires_grad), None)
        if self._recording() and first is not None:
            first.register_hook(lambda gradient: self._mark(f"backward {name}"))

    def _mark(self, name: str) -> None:
        self._marks.append((time.perf_counter_ns(), name))

    def write(self) -> None:
        """Ends the recording, waits for what is in flight, and writes what there is."""
        for handle in self._handles:
            handle.remove()
        self.spans = spans = self._engine.stop_trace()
        for (start, name), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                spans.append({"lane": "compute", "name": name, "start": start, "end": end})
        self._step = self._end + 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(chrome(spans, self.rank)) + "\n")


def check_steps(steps: int, skip: int) -> None:
    """Raises ValueError."""
    if steps < 1 or skip < 0:
        raise ValueError(f"steps must be at least 1 and skip at least 0, not {steps} and {skip}.")


def _parts(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Top-level parts; lists and sequences of them are opened."""
    found = []
    for name, child in net.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            found += [(f"{name}.{inner}", part) for inner, part in child.named_children()]
        else:
            found.append((name, child))
    return found


def _tensors(output: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [each for each in tree_leaves(output) if isinstance(each, torch.Tensor)]


def chrome(spans: list[Span], rank: int = 0) -> dict[str, Any]:
    """Spans (lane, name, start and end in ns) as complete events, a row for each lane; times from the first one."""
    rows = timeline.lanes(spans)
    begun = min((span["start"] for span in spans), default=0)
    names = [
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": lane}}
        for row, lane in enumerate(rows)
    ]
    events = [
        {
            "ph": "X",
            "name": span["name"] or span["lane"],
            "cat": span["lane"],
            "pid": rank,
            "tid": rows.index(span["lane"]),
            "ts": (span["start"] - begun) / 1e3,
            "dur": (span["end"] - span["start"]) / 1e3,
        }
        for span in sorted(spans, key=lambda span: span["start"])
    ]
    process = {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    return {"displayTimeUnit": "ms", "traceEvents": [process, *names, *events]}
