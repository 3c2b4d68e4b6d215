"""What holds on the host holds on a GPU: the same tests with CUDA tensors, over NCCL."""

from __future__ import annotations

import itertools

import on_gpu
import on_streams
import test_all_to_all
import test_collectives
import test_compressed_schedule
import test_compressors_feedback
import test_compressors_golden
import test_compressors_hook
import test_cuda_forms
import test_dense_eight_bits
import test_dense_element_scales
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

pytestmark = on_gpu.NEEDED

MODES = ["sharded", "replicated"]
KINDS = list(test_compressors_golden.KINDS)

# Functions of the host's tests, with what they are called with.
CASES: list[on_gpu.Case] = [
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
    *((test_dense_few_bits.started, (scale,)) for scale in ("block", "element")),
    (test_dense_element_scales.resumed, ({},)),
    (test_dense_element_scales.skipped, ("skip",)),
    (test_dense_element_scales.under_the_schedule, ()),
    (on_streams.several_wait, ()),
    (on_streams.runs_ahead, ()),
    (on_streams.one_read_a_step, ()),
    (on_streams.capture_is_refused, ()),
    (on_streams.read_elsewhere, ()),
    (on_streams.touched_elsewhere, ()),
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
CASES_OF_FOUR: list[on_gpu.Case] = [
    *((test_owned_native.halves, (sizes,)) for sizes in ([3000, 999, 0, 6], [1200, 1200, 1200, 1194])),
]


@on_gpu.each_of(CASES)
def test_as_on_the_host(gpu2: WorkerPool, case: on_gpu.Case) -> None:
    on_gpu.run(gpu2, case)


@on_gpu.each_of(CASES_OF_FOUR)
def test_four_ranks_as_on_the_host(gpu4: WorkerPool, case: on_gpu.Case) -> None:
    on_gpu.run(gpu4, case)
