"""Wrappers put their names into those of parameters: nothing that is drawn, saved or said by name may depend on it."""

import copy

import pytest
import torch
import training
from models import Mlp
from silence import check_told, told
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear
from dear._names import plain

WRAPPERS = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "checkpointed": checkpoint_wrapper,
    "not at all": lambda module: module,
}


def compressors():
    """Low rank, whose first factors are drawn by name; with choices by name."""
    return compress.PowerSGD(rank=2, min_compression_ratio=0.2, exempt="last", rank_of={"first.*": 3})


class Run:
    """A model whose first layer is wrapped, under a compressor."""

    def __init__(self, how, scheduled):
        torch.manual_seed(0)
        net = Mlp()
        net.first = WRAPPERS[how](net.first)
        self.model, self.compressor = DDP(net), compressors()
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        if scheduled:
            self.engine = dear.attach(self.model, self.optimizer, compressor=self.compressor, bucket_cap_mb=0.002)
        else:
            self.engine = None
            compress.register(self.model, self.compressor)

    def train(self, rank, steps):
        for step in steps:
            training.plain_step(self.model, self.optimizer, rank, step)
        return {plain(name): value.clone() for name, value in self.model.module.state_dict().items()}

    def save(self):
        if self.engine is not None:
            state = self.engine.state_dict()
        else:
            state = {"optimizer": self.optimizer.state_dict(), "compressor": self.compressor.state_dict(gather=True)}
        return copy.deepcopy(state)  # torch's optimizers share their tensors with what they saved and loaded

    def load(self, weights, state):
        state = copy.deepcopy(state)
        own = self.model.module.state_dict()
        self.model.module.load_state_dict({name: weights[plain(name)] for name in own})
        if self.engine is not None:
            self.engine.load_state_dict(state)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
            self.compressor.load_state_dict(state["compressor"])


@told
def trained(rank, world, scheduled):
    """Wrapped or not, the same training; and each goes on from the other's state."""
    torch._dynamo.reset()
    wanted = Run("not at all", scheduled)
    halfway = wanted.train(rank, range(3))
    state = wanted.save()
    end = wanted.train(rank, range(3, 6))
    for how in ("compiled", "checkpointed"):
        run = Run(how, scheduled)
        for name, value in run.train(rank, range(3)).items():
            assert torch.equal(value, halfway[name]), (how, name)
        ours = run.save()
        for into, one in ((how, state), ("not at all", ours)):
            resumed = Run(into, scheduled)
            resumed.load(halfway, one)
            for name, value in resumed.train(rank, range(3, 6)).items():
                assert torch.equal(value, end[name]), (how, into, name)


@pytest.mark.parametrize("scheduled", [True, False], ids=["schedule", "hook"])
def test_low_rank_trains_alike_whatever_wraps_the_model(pool2, scheduled):
    check_told(pool2, trained, scheduled)


def test_wrappers_leave_no_trace_in_names():
    assert plain("_orig_mod.blocks.0._checkpoint_wrapped_module.weight") == "blocks.0.weight"
    assert plain("_orig_mod") == "" and plain("module.weight") == "module.weight"
    assert compress.TopK(exempt="_orig_mod.first").exempt.patterns == ("first",)
