"""Preconditioners and Muon on a GPU, over NCCL: what plain DDP or their golden models make on the host."""

from __future__ import annotations

import on_gpu
import on_streams
import test_eva
import test_eva_state
import test_owned
import test_owned_state
import test_precondition
import test_precondition_steps
import test_state
from test_precondition import OWNED
from workers import WorkerPool

import precondition

pytestmark = on_gpu.NEEDED

#: Of two ranks; what more depends on comes first.
CASES: list[on_gpu.Case] = [
    *((test_eva.as_golden, (kind, (way,))) for kind in test_eva.KINDS for way in (None, {}, {"update": "owned"})),
    *(
        (test_precondition.equal_to_golden, (kind, "cholesky", attach))
        for kind in ("KFAC", "DPKFAC")
        for attach in (None, OWNED)
    ),
    *((test_owned.muon, (attach,)) for attach in ({}, {"bucket_cap_mb": 0.002})),
    (test_state.resumed, ("owned", test_owned_state.OPTIMIZERS["hybrid"], 3)),
    *((test_eva_state.resumed, (kind, "sharded")) for kind in test_eva.KINDS),
    *((test_precondition.equal_to_golden, (kind, "eigen", OWNED)) for kind in ("KFAC", "DPKFAC")),
    *((test_precondition.in_16_bits, (attach,)) for attach in (None, OWNED)),
    *((on_streams.runs_ahead, (kind,)) for kind in (precondition.Eva, precondition.FOOF)),
    (test_precondition.on_models, ()),
    (test_eva_state.unused, ()),
    (test_eva_state.dropped, ()),
    (test_precondition_steps.accumulated, (OWNED,)),
    (test_precondition_steps.non_finite, (None, float("nan"))),
    (test_precondition_steps.by_hand, (False,)),
    (test_precondition_steps.partly_optimized, ()),
]


@on_gpu.each_of(CASES)
def test_as_on_the_host(gpu2: WorkerPool, case: on_gpu.Case) -> None:
    on_gpu.run(gpu2, case)
