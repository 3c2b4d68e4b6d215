"""States saved before, at and next to a change of the rank, together with dense first steps."""

import pytest
import torch
from compressing import KINDS, SHAPES, attach, backward, gradients

import compress
from compress.saved import merge_states

OPTIONS = {
    "learned and changed": {"rank": [(0, 8), (4, 2)], "start_step": 4},
    "changed while dense": {"rank": [(0, 2), (2, 8), (4, 3)], "start_step": 6},
    "changed twice": {"rank": [(0, 8), (4, 2), (5, 8)]},
}


def resumed(rank: int, world: int, kind: str, which: str) -> None:
    """A run that goes on from any step has the same results, bit for bit."""
    compressor = getattr(compress, kind)(**OPTIONS[which])
    model = attach(compressor)
    states, results = [], []
    for step in range(8):
        states.append(compressor.state_dict(gather=True))
        results.append(backward(model, gradients(rank, step)))
    for begin in (3, 4, 5):
        again = getattr(compress, kind)(**OPTIONS[which])
        again.load_state_dict(states[begin])
        model = attach(again)
        for step in range(begin, 8):
            have = backward(model, gradients(rank, step))
            assert all(torch.equal(have[name], results[step][name]) for name in SHAPES), (begin, step)


@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("kind", ["ACPSGD", "PowerSGD", "LocalPowerSGD"])
def test_the_factors_that_count_are_saved(pool2, kind, which):
    pool2.run(resumed, kind, which)


class OnAGPU(torch.Tensor):
    """Stands for a tensor of a GPU's: only what leaves it is a plain one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else result


def gathered(rank: int, world: int) -> None:
    compressor = compress.Dense(torch.int3, scale="element")
    kept = torch.ones(3).as_subclass(OnAGPU)
    compressor.feedback.errors["w"], compressor.feedback.owned["w"] = kept, (0, kept)
    compressor.squares.load({"w": kept})
    own = compressor.state_dict()
    for state in compressor.state_dict(gather=True)["ranks"]:
        for one, plain in ((own, False), (state, True)):
            tensors = one["errors"]["w"], one["owned"]["w"][1], one["named"]["w"]
            assert all((type(tensor) is torch.Tensor) == plain for tensor in tensors)


def test_what_all_ranks_gather_is_on_the_host(pool2):
    pool2.run(gathered)


def resumed_early(rank: int, world: int, kind: str, static: bool) -> None:
    """Owners of elements, and so their error feedback, are the same before and after the first state is saved."""
    ddp = {"static_graph": True} if static else {}
    compressor = KINDS[kind](min_compression_ratio=0.1)
    model = attach(compressor, **ddp)
    states, results = [], []
    for step in range(5):
        results.append(backward(model, gradients(rank, step)))
        states.append(compressor.state_dict(gather=True))
    assert states[0]["ranks"][0]["layout"] == states[-1]["ranks"][0]["layout"]
    for saved in (1, 2):
        again = KINDS[kind](min_compression_ratio=0.1)
        again.load_state_dict(states[saved - 1])
        model = attach(again, **ddp)
        for step in range(saved, 5):
            have = backward(model, gradients(rank, step))
            assert all(torch.equal(have[name], results[step][name]) for name in SHAPES), (saved, step)


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_saved_after_one_step_goes_on(pool2, kind, static):
    pool2.run(resumed_early, kind, static)


def resumed_at_density(rank: int, world: int) -> None:
    """Each density has a threshold of its own, which none of before takes the place of."""
    options = {"density": [(0, 0.9), (3, 0.7)], "selection": "threshold", "min_compression_ratio": 0.1}
    compressor = compress.TopK(**options)
    model = attach(compressor)
    states, results = [], []
    for step in range(6):
        states.append(compressor.state_dict(gather=True))
        results.append(backward(model, gradients(rank, step)))
    for begin in (2, 3, 4):
        again = compress.TopK(**options)
        again.load_state_dict(states[begin])
        model = attach(again)
        for step in range(begin, 6):
            have = backward(model, gradients(rank, step))
            assert all(torch.equal(have[name], results[step][name]) for name in SHAPES), (begin, step)


def test_the_threshold_of_a_density_is_its_own(pool2):
    pool2.run(resumed_at_density)


def thresholds_elsewhere(rank: int, world: int, saved: list[dict] | None) -> dict:
    """A state of another world size says nothing of this one's thresholds, and none of before stay."""
    compressor = KINDS["threshold"]()
    model = attach(compressor)
    for step in range(2):
        backward(model, gradients(rank, step))
    state = compressor.state_dict()
    assert any(any(one) for one in state["own"].values()), "no threshold was sampled"
    if saved is not None:
        compressor.load_state_dict(state)
        assert compressor.own_state() == state["own"]
        compressor.load_state_dict(saved)
        assert compressor.own_state() == {}
    return state


def test_what_is_one_ranks_own_is_lost_at_another_world_size(pool2, pool4):
    pool2.run(thresholds_elsewhere, pool4.run(thresholds_elsewhere, None))


def test_ranks_that_are_new_owe_the_same_parameters_as_the_others():
    """What is owed on one rank goes on being compressed, so a rank that owed nothing would send something else."""
    states = [{"world_size": 2, "errors": {"weight": torch.ones(3)}, "owned": {}} for _ in range(2)]
    for rank in range(4):
        _, feedback = merge_states(states, rank, 4)
        assert feedback.begun == {"weight"}
        owed = feedback.errors.get("weight", torch.zeros(3))
        assert torch.equal(owed, torch.full((3,), 2.0 if rank < 2 else 0.0))
