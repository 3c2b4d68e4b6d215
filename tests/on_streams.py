"""What is true of a device's streams alone: cases for tests/test_cuda.py, called as the ranks of an NCCL group."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import test_two_levels
import torch
import torch.distributed as dist
from place import place
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear
from dear import _C

CYCLES = 2_000_000_000  # about a second: far more than the host takes for the steps below
# In its first ten steps DDP times itself, for which its forward pass waits for the device.
FIRST_STEPS = 12


def model_of(width: int = 64) -> DDP:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    return DDP(net.to(place()), gradient_as_bucket_view=True)


def several_wait(rank: int, world: int) -> None:
    """Every stream that waits for an exchange is ordered behind its result, not only the first one's."""
    numel = 1 << 20
    source = torch.full((numel,), float(rank + 1), device=place())
    expected = sum(range(1, world + 1)) / world
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda._sleep(CYCLES // 10)  # the exchange begins after all have waited
        work = dear.all_reduce(source.clone(), op="avg", algorithm="native")
        seen = []
        for stream in streams:
            with torch.cuda.stream(stream):
                seen.append(work.wait().clone())
        torch.cuda.synchronize()
        for one in seen:
            assert torch.equal(one, torch.full_like(one, expected))


def runs_ahead(rank: int, world: int, make: Callable[[], Any] = lambda: None) -> None:
    """The host of a dense step waits for no device: while the GPU is kept busy, it goes through whole steps."""
    for update in ("sharded", "owned", "replicated"):
        if update == "replicated" and make() is not None:
            continue  # which has no owners, where a preconditioner works
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with dear.attach(model, optimizer, update=update, preconditioner=make()):
            x = torch.randn(8, 64, device=place())

            def step(model=model, optimizer=optimizer, x=x) -> None:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

            for _ in range(FIRST_STEPS):
                step()
            torch.cuda.synchronize()
            dist.barrier()
            torch.cuda._sleep(CYCLES)
            busy = torch.cuda.Event()
            busy.record()
            for _ in range(2):
                step()
            assert not busy.query(), f"the host has waited for the device with update={update!r}"
            torch.cuda.synchronize()


def one_read_a_step(rank: int, world: int) -> None:
    """Whether all gradients were finite is read from the device once a step, however many groups there are."""
    model = DDP(
        nn.Sequential(*(nn.Linear(64, 64) for _ in range(12))).to(place()),
        bucket_cap_mb=0.02,
        gradient_as_bucket_view=True,
    )
    compress.register(model, compress.SignSGD(min_compression_ratio=0.1))
    x = torch.randn(8, 64, device=place())
    for _ in range(3):
        model(x).square().mean().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).square().mean().backward()
    reads = sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")
    assert reads <= 1, reads


def capture_is_refused(rank: int, world: int) -> None:
    """A whole step in a CUDA graph, as it would be captured: on a stream of its own, behind first steps there."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # on which DDP adds up gradients, too, as it was wrapped there
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(8, 64, device=place())
        with dear.attach(model, optimizer, update="replicated"):
            for _ in range(FIRST_STEPS):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            model(x)  # so that nothing of the last step is left to be waited for
            torch.cuda.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                with pytest.raises(RuntimeError, match="A CUDA graph is being captured"):
                    model(x).square().mean().backward()
            finally:
                graph.capture_end()


def read_elsewhere(rank: int, world: int) -> None:
    """Who reads a parameter first, on a stream or in a mode of its own, finds what it would find anywhere."""

    def reads_beside(model: DDP) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            model.module[0].weight.clone()

    def reads_with_fakes(model: DDP) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.module(torch.empty(4, 64, device=place()))

    def trained(read: Callable[[DDP], None], make: Callable[[], compress.Compressor | None]) -> list[torch.Tensor]:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(rank)
        x = torch.randn(8, 64, device=place())
        with dear.attach(model, optimizer, compressor=make(), update="replicated", bucket_cap_mb=0.01):
            for _ in range(6):
                model(x).square().mean().backward()
                torch.cuda._sleep(CYCLES // 50)  # what is read is still on its way
                optimizer.step()
                read(model)
                optimizer.zero_grad()
        return [param.detach().clone() for param in model.parameters()]

    kinds = (lambda: None, lambda: compress.ACPSGD(rank=4), lambda: compress.Dense(torch.bfloat16))
    for make in kinds:
        expected = trained(lambda model: None, make)
        for read in (reads_beside, reads_with_fakes):
            for found, right in zip(trained(read, make), expected, strict=True):
                assert torch.equal(found, right), f"{read.__name__} changes the training under {make()}"


def touched_elsewhere(rank: int, world: int) -> None:
    """Training waits for what another stream was the first to touch: averaged gradients, updated parameters."""

    def touch(tensors: Iterable[torch.Tensor]) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for tensor in tensors:
                tensor.clone()

    def trained(update: str, gradients: bool = False, parameters: bool = False) -> list[torch.Tensor]:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(rank)
        x = torch.randn(8, 64, device=place())
        with dear.attach(model, optimizer, update=update, bucket_cap_mb=0.01):
            for _ in range(6):
                loss = model(x).square().mean()
                torch.cuda._sleep(CYCLES // 50)  # what is touched is still on its way
                loss.backward()
                if gradients:
                    touch(param.grad for param in model.parameters())
                optimizer.step()
                if parameters:
                    touch(model.parameters())
                optimizer.zero_grad()
        return [param.detach().clone() for param in model.parameters()]

    for update in ("sharded", "owned", "replicated"):
        expected = trained(update)
        ways = [{"parameters": True}, *([{"gradients": True}] if update == "replicated" else [])]
        for way in ways:
            for found, right in zip(trained(update, **way), expected, strict=True):
                assert torch.equal(found, right), f"{next(iter(way))} touched elsewhere change update={update!r}"


def submitted_beside(rank: int, world: int) -> None:
    """The stream that submits an exchange of two levels waits for neither. Of four ranks."""
    lane = test_two_levels.levelled(test_two_levels.CONSECUTIVE, "native")
    full = torch.ones(world * 1000, device=place())
    begin, end = dear.shard_range(full.numel(), world, rank)
    # Late are those whom the other ranks meet in the first level: in their node, or in the other one.
    for phase, late in ((_C.Phase.reduce_scatter, rank % 2 == 1), (_C.Phase.all_gather, rank >= 2)):
        part = [(full, full[begin:end])]
        lane.submit(phase, _C.Reduction.sum, part, "the first of its kind").wait()
        torch.cuda.synchronize()
        dist.barrier()
        if late:
            torch.cuda._sleep(CYCLES)
        exchange = lane.submit(phase, _C.Reduction.sum, part, "an exchange that begins late")
        beside = torch.cuda.Event()
        beside.record()
        deadline = time.monotonic() + 0.3
        while not late and not beside.query() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert late or beside.query(), f"the stream that submits a {phase.name} waits for it"
        exchange.wait()
        torch.cuda.synchronize()
