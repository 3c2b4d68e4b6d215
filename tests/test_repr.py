"""What a compressor and a preconditioner print as."""

import pytest
import torch

import compress
import precondition


def exact(name: str, param: torch.Tensor) -> bool:
    return param.dim() == 1


@pytest.mark.parametrize(
    "made, text",
    [
        (compress.ACPSGD(rank=2), "ACPSGD(rank=2)"),
        (
            compress.PowerSGD(rank_of={"head": 3}, exempt="*.bias"),
            "PowerSGD(rank=4, rank_of={'head': 3}, exempt=('*.bias',))",
        ),
        (compress.TopK(0.05, start_step="warmup"), "TopK(density=0.05, start_step='warmup')"),
        (compress.Dense(exempt=exact), "Dense(dtype=torch.bfloat16, error_feedback=False, exempt=exact)"),
        (precondition.Eva(damping=0.5), "Eva(damping=0.5, factor_decay=0.05, kl_clip=0.001)"),
        (
            precondition.DPKFAC(update_every=2),
            "DPKFAC(damping=0.003, factor_decay=0.95, update_every=2, inverse_every=10, kl_clip=0.001, "
            "solver='cholesky')",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_options_are_shown(made, text):
    assert repr(made) == text


def test_what_was_assigned_is_shown():
    compressor = compress.PowerSGD(rank=4)
    compressor.rank = 8
    assert repr(compressor) == "PowerSGD(rank=8)"
