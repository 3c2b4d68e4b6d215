"""Memory: what holds copies of the model, and the benchmark that measures it."""

import io
from typing import Any

import pytest
import torch
import training
from rich.console import Console

import compress
import dear
from benchmarks.memory import show
from benchmarks.memory.__main__ import arguments, loads
from benchmarks.memory.measure import Load, run_cell
from benchmarks.network.lab import open_lab
from benchmarks.records import Source
from benchmarks.report.others import memory_table

# No copy of a model with these settings is small against what a process takes anyway.
SETTINGS = {"optimizer": "adamw", "steps": 3, "batch": 1, "length": 16, "layers": 4, "width": 640}


def storages(tensors: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def buffers(rank, world, update, views):
    """Gradients stay in DDP's buckets, whatever the user has chosen; averages that are gathered take their place."""
    model, opt = training.build("Mlp", training.SGD, {"gradient_as_bucket_view": views})
    engine = dear.attach(model, opt, update=update, bucket_cap_mb=0.002)
    params = list(model.module.parameters())
    seen: list[set[int]] = []
    for step in range(3):
        loss = training.loss_of(model, rank, step)
        loss.backward()
        with torch._C.DisableTorchFunctionSubclass():
            seen.append(storages(param.grad for param in params))
        opt.step()
        opt.zero_grad()
    layout = engine._attached.layout
    buckets, full = storages(b.buffer for b in layout.buckets), storages(layout.full)
    assert seen[-1] == buckets
    assert buckets == full if update == "replicated" else buckets.isdisjoint(full)
    assert model.gradient_as_bucket_view
    engine.detach()
    assert model.gradient_as_bucket_view == views


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_gradients_have_one_place(pool2, update, views):
    pool2.run(buffers, update, views)


def compressed_buffers(rank, world):
    """A compressor's results come in the place of gradients; a measured step still compares them with these."""
    for compressor in (compress.ACPSGD(rank=2, start_step=2), compress.TopK(density=0.1), compress.SignSGD()):
        model, opt = training.build("Mlp", training.SGD, {})
        engine = dear.attach(model, opt, compressor=compressor, bucket_cap_mb=0.002)
        for step in range(4):
            if step == 3:
                compressor.measure()
            training.plain_step(model, opt, rank, step)
        layout = engine._attached.layout
        assert storages(b.buffer for b in layout.buckets) == storages(layout.full)
        vnmse = compressor.stats()["vnmse"]
        assert vnmse is not None and 0 < vnmse < 2, (compressor, vnmse)
        engine.detach()


def test_compressed_results_take_the_place_of_gradients(pool2):
    pool2.run(compressed_buffers)


def exact_measure(rank, world):
    """Dense until the second step: the measured first step is exact, which compared with the result it is not."""
    compressor = compress.TopK(density=0.1, start_step=2)
    model, opt = training.build("Mlp", training.SGD, {})
    compressor.measure()
    engine = dear.attach(model, opt, compressor=compressor, bucket_cap_mb=0.002)
    training.plain_step(model, opt, rank, 0)
    assert compressor.stats()["vnmse"] < 1e-12
    engine.detach()


def test_a_measured_dense_step_is_exact(pool2):
    pool2.run(exact_measure)


def measured(strategy: str, **more: Any) -> dict[str, Any]:
    with open_lab(2, None, "loopback") as lab:
        cell = run_cell(lab, Load(strategy, **SETTINGS | more), lambda done, total, doing: None)
    assert not cell["failure"], cell["failure"]
    return cell


@pytest.mark.slow
def test_sharded_needs_less_than_plain_ddp():
    sharded, views, copies = measured("dear:sharded"), measured("ddp"), measured("ddp", views=False)
    for ddp in (views, copies):
        assert sharded["steady_bytes"] < ddp["steady_bytes"]
        assert sharded["peak_bytes"] < 1.15 * ddp["peak_bytes"]
    assert sharded["allocated_bytes"] < views["allocated_bytes"] - 0.3 * views["parameter_bytes"]


@pytest.mark.slow
def test_a_compressor_under_the_schedule_needs_no_more_than_as_a_hook():
    scheduled, hook = measured("dear+acp:4"), measured("acp:4")
    assert scheduled["allocated_bytes"] < 1.05 * hook["allocated_bytes"]


def test_the_tables():
    experiment = {"strategy": "ddp", "views": False, "optimizer": "adamw"}
    sizes = {"parameter_bytes": 100, "peak_bytes": 536, "steady_bytes": 528, "allocated_bytes": None}
    good = {"plan": experiment, "workers": 2, "failure": None, **sizes}
    failed = {"plan": experiment | {"strategy": "dear", "views": True}, "workers": 2, "failure": "rank 1: no memory"}
    page = memory_table([Source("memory.json", "memory", {"cells": [good, failed]})])
    assert page.splitlines()[2] == "| `ddp, gradient_as_bucket_view=False` | 5.36 | 5.28 |  |"
    console = Console(file=io.StringIO(), width=120)
    show.show([good, failed], console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "5.36" in printed and "dear failed, rank 1: no memory" in printed


def test_the_options(monkeypatch):
    monkeypatch.setattr("sys.argv", ["memory", "--strategies", "ddp,sign"])
    found = loads(arguments())
    assert list(found) == ["ddp", "ddp, copies", "sign"]
    assert [load.views for load in found.values()] == [True, False, True]
