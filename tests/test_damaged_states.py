"""A compressor's state that was damaged is refused in one sentence, and nothing of it is taken."""

import copy

import pytest
import torch
import training
from compressing import KINDS
from workers import run_workers

import compress
import dear

DAMAGE = {
    "named": lambda state: state.update(named="P"),
    "start": lambda state: state.update(start=3),
    "exempt": lambda state: state.update(exempt="all"),
    "missing": lambda state: state.pop("named"),
    "step": lambda state: state.update(step="3"),
    "made with": lambda state: state.update(made_with="P"),
    "layout": lambda state: state.update(layout=None),
    "errors": lambda state: state["errors"].update({n: e.long() for n, e in state["errors"].items()}),
    "no own": lambda state: state.pop("own"),
}


def of_own(state):
    return state["own"]["factors"]


OF_KINDS = {
    "acp": {
        "factors": lambda state: state["named"].update(dict.fromkeys(state["named"], "P")),
        "factor": lambda state: state["named"].update({n: (p.double(), q) for n, (p, q) in state["named"].items()}),
    },
    "local": {
        "own": lambda state: state.update(own=3),
        "no factors": lambda state: state["own"].update(factors=None),
        "names": lambda state: state.update(begun="P"),
        "factor": lambda state: state["own"].update(factors={n: (p, 3) for n, (p, _) in of_own(state).items()}),
    },
    "threshold": {
        "own": lambda state: state.update(own=3),
        "names": lambda state: state.update(own={"P": [1.0]}),
        "thresholds": lambda state: state["own"].update({key: ["1"] for key in state["own"]}),
    },
    "element": {
        "squares": lambda state: state["named"].update({n: s.double() for n, s in state["named"].items()}),
    },
    "sign": {},
}


def damaged(rank, world, kind):
    model, opt = training.build("Mlp", training.SGD, {})
    kinds = KINDS | {"element": lambda **options: compress.Dense(torch.int3, scale="element", **options)}
    compressor = kinds[kind](min_compression_ratio=0.2)
    with dear.attach(model, opt, compressor=compressor, bucket_cap_mb=0.002):
        for step in range(2):
            training.plain_step(model, opt, rank, step)
        good = compressor.state_dict(gather=True)
        feedback = compressor.feedback
        for damage in [*DAMAGE.values(), *OF_KINDS[kind].values()]:
            state = copy.deepcopy(good)
            damage(state["ranks"][0])
            with pytest.raises(ValueError, match=r"The compressor's state is damaged: .*; load what state_dict\(\)"):
                compressor.load_state_dict(state)
            assert compressor.feedback is feedback
        compressor.load_state_dict(good)
        assert compressor.step == 2
        training.plain_step(model, opt, rank, 2)


@pytest.mark.parametrize("kind", OF_KINDS)
def test_a_damaged_state_is_refused(kind):
    run_workers(damaged, 1, kind)


@pytest.mark.parametrize("slack", [float("inf"), float("nan"), 0.5])
def test_slack_is_a_finite_number(slack):
    with pytest.raises(ValueError, match="slack must be 1 or more, and finite"):
        compress.TopK(slack=slack)
