"""What holds on the host holds on a GPU: the same tests with CUDA tensors, over NCCL.

Two workers share one GPU: to NCCL they are hosts of their own (see workers.py), which it connects by sockets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import on_streams
import pytest
import test_all_to_all
import test_collectives
import test_compressed_schedule
import test_compressors_feedback
import test_compressors_golden
import test_compressors_hook
import test_cuda_forms
import test_dense_eight_bits
import test_dense_few_bits
import test_owned
import test_owned_lists
import test_owned_native
import test_parity
import test_schedule
import test_scheduled_feedback
import test_stale_reads
import test_state
import torch
from workers import WorkerPool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

MODES = ["sharded", "replicated"]
KINDS = list(test_compressors_golden.KINDS)

# Functions of the host's tests, with what they are called with.
CASES: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (test_collectives.halves_are_exact, ("native",)),
    (test_all_to_all.the_public_call, ("native",)),
    *((test_parity.all_models, (mode, view, True)) for mode in MODES for view in (False, True)),
    *((test_parity.optimizers, (mode,)) for mode in MODES),
    *((test_parity.loops, (mode, False)) for mode in MODES),
    *((test_parity.schedule_and_groups, (mode,)) for mode in MODES),
    (test_owned.all_models, (test_owned.training.SGD, True)),
    (test_owned.all_models, (test_owned.FACTORED, False)),
    *((function, (("native",),)) for function in (test_owned.optimizers, test_owned.wide, test_owned_lists.parity)),
    *((test_owned_native.halves, (sizes,)) for sizes in ([3000, 999], [0, 300], [3000, 2994])),
    (test_parity.clip, ()),
    (test_parity.scaler, ()),
    *((test_stale_reads.state_reads, (mode,)) for mode in MODES),
    *((test_stale_reads.forwards, (mode, name)) for mode in MODES for name in ("Mlp", "Functional")),
    *((test_schedule.hook_calls, (mode,)) for mode in MODES),
    *((test_state.resumed, (mode, test_state.ADAM, 3)) for mode in MODES),
    *((test_compressors_golden.low_rank, case) for case in itertools.product(("acp", "power", "local"), (True, False))),
    *((test_compressors_golden.rounded, (kind, torch.int8, 0.25, 0.6, 0.05)) for kind in ("acp", "power", "local")),
    *((test_compressors_golden.flat_kinds, (kind,)) for kind in ("topk", "sign", "majority")),
    *((test_compressors_golden.sixteen_bits, (dtype, None)) for dtype in (torch.bfloat16, torch.float16)),
    *((test_dense_eight_bits.as_said, (dtype,)) for dtype in (torch.int8, torch.float8_e4m3fn)),
    *((test_dense_few_bits.as_said, (scale,)) for scale in ("block", "element")),
    (on_streams.several_wait, ()),
    (on_streams.runs_ahead, ()),
    (on_streams.one_read_a_step, ()),
    (on_streams.capture_is_refused, ()),
    (on_streams.read_elsewhere, ()),
    *((form, (mode,)) for form in test_cuda_forms.FORMS.values() for mode in MODES),
    *((test_compressors_feedback.conserved, (kind, True, True)) for kind in KINDS),
    *((test_compressors_feedback.resume, (kind, True, False)) for kind in KINDS),
    (test_compressors_hook.all_models, ()),
    (test_compressors_hook.accumulation, ()),
    (test_compressors_hook.bad_gradients, ()),
    (test_compressors_hook.grad_scaler, ()),
    *((test_compressed_schedule.same_training, (kind,)) for kind in test_compressed_schedule.KINDS),
    *((test_compressed_schedule.bad_gradients, (kind,)) for kind in ("acp", "topk", "bf16")),
    (test_compressed_schedule.grad_scaler, ()),
    (test_compressed_schedule.clipping, ()),
    (test_compressed_schedule.statistics, ()),
    *((test_scheduled_feedback.unused, (kind, False)) for kind in KINDS),
]


#: The same, with four ranks.
CASES_OF_FOUR: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    *((test_cuda_forms.two_levels, (mode,)) for mode in (*MODES, "owned")),
    *((test_owned_native.halves, (sizes,)) for sizes in ([3000, 999, 0, 6], [1200, 1200, 1200, 1194])),
]


@pytest.fixture(scope="module")
def gpu2() -> Iterator[WorkerPool]:
    """Two warm workers on one GPU, with a cuBLAS that computes the same each time."""
    with WorkerPool(2, env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}) as pool:
        yield pool


@pytest.fixture(scope="module")
def gpu4() -> Iterator[WorkerPool]:
    """Four."""
    with WorkerPool(4, env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}) as pool:
        yield pool


def on_the_gpu(rank: int, world: int, case: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The case, where the same computation gives the same bits."""
    torch.cuda.set_device(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = allocations()
    case(rank, world, *args)
    torch.cuda.synchronize()
    assert allocations() > before, "nothing was on the GPU"


def allocations() -> int:
    """How many there have been on the GPU."""
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


def name_of(case: tuple[Callable[..., Any], tuple[Any, ...]]) -> str:
    function, args = case
    module = function.__module__.removeprefix("test_")
    return "-".join([module, function.__name__, *(str(each) for each in args if not isinstance(each, tuple))])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_as_on_the_host(gpu2: WorkerPool, case: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    gpu2.run(on_the_gpu, *case, backend="nccl", timeout=100, group_timeout=60)


@pytest.mark.parametrize("case", CASES_OF_FOUR, ids=name_of)
def test_four_ranks_as_on_the_host(gpu4: WorkerPool, case: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    gpu4.run(on_the_gpu, *case, backend="nccl", timeout=100, group_timeout=60)
