"""Two levels on a GPU, over NCCL: two nodes of two ranks, dense, compressed between nodes, and preconditioned."""

from __future__ import annotations

import on_gpu
import on_streams
import test_dense_element_scales
import test_eva
import test_precondition
import test_two_levels
import test_two_levels_compressed
import torch
from workers import WorkerPool

pytestmark = on_gpu.NEEDED

NODES = {"consecutive": test_two_levels.CONSECUTIVE, "alternating": test_two_levels.ALTERNATING}
SHAPES, RUNS = test_two_levels_compressed.SHAPES, test_two_levels_compressed.RUNS
FIRST_IN_EIGHT_BITS = {"start_dtype": torch.int8}

#: Of four ranks; what more depends on comes first.
CASES: list[on_gpu.Case] = [
    *((test_two_levels.halves_are_exact, (nodes, "native")) for nodes in NODES.values()),
    *((test_two_levels.trains_alike, (update, "native")) for update in ("sharded", "owned", "replicated")),
    (test_two_levels.in_nodes_of_the_launcher, ()),
    (on_streams.submitted_beside, ()),
    *((test_two_levels_compressed.as_said, (kind, SHAPES)) for kind in test_two_levels_compressed.KINDS),
    *((test_two_levels_compressed.conserved, (kind,)) for kind in ("topk", "sign", "int8", "acp", "power", "power8")),
    (test_dense_element_scales.between_nodes, (0, {})),
    (test_dense_element_scales.between_nodes, (2, FIRST_IN_EIGHT_BITS)),
    *((test_eva.as_golden, (kind, ({"hierarchy": 2},))) for kind in test_eva.KINDS),
    *(
        (test_precondition.equal_to_golden, (kind, "cholesky", test_precondition.IN_TWO_LEVELS))
        for kind in ("KFAC", "DPKFAC")
    ),
    *((test_two_levels.resumes, (update,)) for update in ("sharded", "replicated")),
    *((test_two_levels_compressed.scheduled, (kind,)) for kind in ("topk", "sign", "power")),
    *((test_two_levels_compressed.not_finite, (kind, SHAPES)) for kind in ("topk", "acp", "power", "local")),
    (test_two_levels_compressed.later, ()),
]


@on_gpu.each_of(CASES)
def test_as_on_the_host(gpu4: WorkerPool, case: on_gpu.Case) -> None:
    on_gpu.run(gpu4, case)
