"""The operators as torch sees them: schemas that tell what is written, fake kernels, compilation, no allocation."""

from collections.abc import Callable

import pytest
import torch
from kernel_cases import DEVICES, counter
from torch import Tensor

from compress import ops, reference
from dear import _C

on_devices = pytest.mark.parametrize("device", DEVICES)
N = 4096 + 10
WORDS = 2 * reference.RECORD


def arguments(name: str, device: str) -> tuple[object, ...]:
    """Valid arguments of each operator."""
    grad, error = torch.randn(N, device=device), torch.randn(N, device=device)
    one, ties, stats = torch.ones(1, device=device), counter(1, device), counter(2, device)
    narrow = torch.zeros(N, dtype=torch.float16, device=device)
    payload, ballots = counter(WORDS, device), counter(3 * WORDS, device).view(3, WORDS)
    slots = counter(2 * ops.topk_slot_numel(50), device).view(2, -1)
    scratch = counter(ops.topk_workspace_numel(N), device)
    return {
        "error_correct": (grad, error, ties),
        "dense_round": (grad, error, narrow, ties),
        "dense_average": (torch.randn(3, N, device=device).half(), error, narrow, ties),
        "sign_encode": (grad, error, payload, ties, True),
        "sign_vote": (ballots, payload, 1),
        "sign_average": (ballots, error, payload, N, ties),
        "sign_decode": (payload, grad),
        "topk_threshold": (grad, error, 40, one, ties, scratch),
        "topk_refresh": (grad, error, 40, one, ties, scratch, 0.1),
        "topk_select": (grad, error, one, None, 4096, slots, stats, scratch),
        "topk_accumulate": (slots, error, 0.5, ties),
        "topk_decode": (slots, grad, 4096, 1.0),
        "low_rank_project": (
            *(torch.randn(300, device=device), torch.randn(2, 10, 12, device=device)),
            *(torch.randn(2, 12, 3, device=device), torch.randn(2, 10, 3, device=device)),
            *(torch.tensor([0, 150], device=device), False, True, ties),
            *(torch.randn(2, 10, 3, device=device), torch.randn(2, 12, 3, device=device)),
        ),
        "low_rank_subtract": (
            *(torch.randn(2, 10, 12, device=device), torch.randn(2, 10, 3, device=device)),
            *(torch.randn(2, 12, 3, device=device), ties),
        ),
        "quantize_encode": (grad, error, 4608, counter(1161, device).view(1, -1), ties, True, 7),
        "quantize_average": (
            *(counter(3 * 1161, device).view(3, -1), error, 4608),
            *(counter(1161, device), N, ties, False, None),
        ),
        "quantize_decode": (counter(1161, device).view(1, -1), 4608, grad, True),
        "levels_encode": (grad, error, 4608, counter(450, device).view(1, -1), ties, 3),
        "levels_average": (counter(3 * 450, device).view(3, -1), error, 4608, counter(450, device), N, ties, 3),
        "levels_decode": (counter(450, device).view(1, -1), 4608, grad, 3),
        "low_rank_decode": (
            *(torch.randn(2, 10, 3, device=device), torch.randn(2, 12, 3, device=device)),
            *(torch.randn(300, device=device), torch.tensor([0, 150], device=device)),
        ),
        "gather_segments": (grad, torch.tensor([[5, 90, 0], [200, 10, 100]], device=device), error, ties),
        "scatter_segments": (error, torch.tensor([[5, 90, 0], [200, 10, 100]], device=device), grad),
        "orthogonalize": (
            torch.randn(2, 20, 3, device=device),
            torch.zeros(ops.orthogonalize_workspace_numel(2, 20, 3), dtype=torch.float64, device=device),
        ),
    }[name]


NAMES = [
    *("error_correct", "dense_round", "dense_average", "sign_encode", "sign_vote", "sign_average", "sign_decode"),
    *("topk_threshold", "topk_refresh", "topk_select", "topk_accumulate", "topk_decode"),
    *("low_rank_subtract", "quantize_encode", "quantize_average", "quantize_decode"),
    *("levels_encode", "levels_average", "levels_decode"),
    *("low_rank_project", "low_rank_decode", "gather_segments", "scatter_segments", "orthogonalize"),
]


@on_devices
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(torch.ops.dear, name).default, arguments(name, device))


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_are_checked_like_real_ones(name: str) -> None:
    operator = getattr(torch.ops.dear, name)
    args = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in arguments(name, "cpu")]
    assert operator(*args) is None
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor):
            wrong = arg.double() if arg.dtype != torch.float64 else arg.float()
            with pytest.raises(TypeError):
                operator(*[wrong if i == position else other for i, other in enumerate(args)])


@on_devices
def test_error_feedback_may_be_left_out(device: str) -> None:
    torch.library.opcheck(
        torch.ops.dear.sign_encode.default, (torch.randn(N, device=device), None, counter(WORDS, device), None, False)
    )


def test_workspace_sizes_agree_with_the_kernels() -> None:
    """The sizes that Python hands out are exactly those the kernels ask for: one element less is refused."""
    for n in (1, 4096, 4097):
        error, one = torch.zeros(n), torch.zeros(1)
        size = ops.topk_workspace_numel(n)
        ops.topk_threshold(None, error, 1, one, counter(1, "cpu"), counter(size, "cpu"))
        with pytest.raises(ValueError, match="workspace"):
            ops.topk_threshold(None, error, 1, one, counter(1, "cpu"), counter(size - 1, "cpu"))
    for batch, rows, columns in ((1, 1, 1), (3, 1024, 5), (2, 1025, 4)):
        size = ops.orthogonalize_workspace_numel(batch, rows, columns)
        matrices = torch.zeros(batch, rows, columns)
        ops.orthogonalize(matrices, torch.zeros(size, dtype=torch.float64))
        with pytest.raises(ValueError, match="workspace"):
            ops.orthogonalize(matrices, torch.zeros(size - 1, dtype=torch.float64))


def test_the_golden_model_defines_the_same_payloads() -> None:
    assert _C.BLOCK == reference.BLOCK
    assert _C.SIGN_RECORD == reference.RECORD


def test_shards_are_whole_blocks_and_cover_the_group() -> None:
    for n in (0, 1, 4096, 4097, 100_000):
        for owners in (1, 2, 3, 8):
            shard = ops.shard_numel(n, owners)
            assert shard % reference.BLOCK == 0
            assert owners * shard >= n


@pytest.mark.parametrize("name", NAMES)
def test_steady_state_allocates_nothing(name: str) -> None:
    operator, args = getattr(torch.ops.dear, name), arguments(name, "cpu")
    operator(*args)
    with torch.profiler.profile(profile_memory=True) as profile:
        operator(*args)
    assert all(event.self_cpu_memory_usage <= 0 for event in profile.key_averages() if event.key != "[memory]")


def test_works_under_compile_with_the_eager_backend() -> None:
    def step(grad: Tensor, error: Tensor, payload: Tensor) -> Tensor:
        ops.sign_encode(grad, error, payload)
        out = torch.empty_like(grad)
        ops.sign_decode(payload, out)
        return out

    compiled: Callable[..., Tensor] = torch.compile(step, backend="aot_eager", fullgraph=True)
    grad = torch.randn(N)
    errors, payloads = [torch.zeros(N), torch.zeros(N)], [counter(WORDS, "cpu"), counter(WORDS, "cpu")]
    expected, actual = step(grad, errors[0], payloads[0]), compiled(grad, errors[1], payloads[1])
    assert torch.equal(actual, expected)
    assert torch.equal(errors[0], errors[1])
    assert torch.equal(payloads[0], payloads[1])


def test_the_kernels_are_built_to_run_on_torchs_threads() -> None:
    if ops.kernel_threads() == 1 and torch.get_num_threads() > 1:
        pytest.skip("the extension was built without OpenMP: the kernels run on one thread")
    assert ops.kernel_threads() == torch.get_num_threads()
