"""Settings that change at step boundaries: training is the same, and the user's handles stay."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import test_owned_lists as owned_lists
import torch
import training
from silence import check_told, told
from torch import optim
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear
from dear._assembly import Setting

ADAMW = (optim.AdamW, {"lr": 0.01})
SMALL = 0.002  # MiB: several groups in a small model


class Scripted:
    """A chooser that follows a list: the setting by step."""

    plan = None

    def __init__(self, settings):
        self.settings, self.boundaries, self.released = settings, 0, 0

    def check_new(self, model: DDP, caller: str):
        return {"the script": [(one.update, one.bucket_cap_mb) for one in self.settings.values()]}

    def first(self, steering):
        return self.settings.get(0)

    def begin(self, steering):
        self.steering = steering

    def step_began(self):
        self.boundaries += 1
        if self.steering.steps in self.settings:
            self.steering.switch(self.settings[self.steering.steps])

    def state_dict(self):
        return None

    def load_state_dict(self, state):
        return False

    def release(self):
        self.released += 1


def zero_late(model, optimizer, rank, step):
    """Gradients are cleared between the forward and the backward pass."""
    loss = training.loss_of(model, rank, step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def accumulate(model, optimizer, rank, step):
    with model.no_sync():
        training.loss_of(model, rank, 100 + step).backward()
    return training.plain_step(model, optimizer, rank, step)


STEPS = {"plain": training.plain_step, "zero_late": zero_late, "accumulate": accumulate}


def switched(rank, world, updates, kind, how, ddp, cap=SMALL):
    plain, plain_opt = training.build("Mlp", kind, ddp)
    model, opt = training.build("Mlp", kind, ddp)
    chooser = Scripted({2 * i: Setting(update, cap * (1 + i % 2)) for i, update in enumerate(updates)})
    engine = dear.attach(model, opt, compressor=chooser)
    seen, former = [], weakref.ref(engine._attached)
    for step in range(2 * len(updates) + 3):
        want = STEPS[how](plain, plain_opt, rank, step)
        assert STEPS[how](model, opt, rank, step) == want, step
        seen.append(engine.update)
    want, have = plain_opt.state_dict(), engine.state_dict()["optimizer"]
    for number, state in want["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(have["state"][number][name]), torch.as_tensor(value)), name
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), "training that switches is not the same training"
    assert former() is None, "former parts are let go, with their lanes and buffers"
    assert seen[0] == updates[0] and list(dict.fromkeys(seen)) == list(dict.fromkeys(updates))
    assert engine.stats()["steps"] == len(seen) and chooser.boundaries == len(seen) - 1
    engine.detach()
    assert chooser.released == 1
    training.plain_step(plain, plain_opt, rank, 50)
    training.plain_step(model, opt, rank, 50)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), "after detach() it is plain DDP"


@pytest.mark.parametrize("how", STEPS)
def test_every_strategy_into_every_other(pool2, how):
    updates = ["sharded", "ddp", "replicated", "sharded", "replicated", "ddp", "sharded", "owned", "ddp", "ddp"]
    pool2.run(switched, updates, ADAMW, how, {"gradient_as_bucket_view": how == "accumulate"})


@pytest.mark.parametrize("ddp", [{"find_unused_parameters": True}, {"static_graph": True}])
def test_graphs_that_ddp_watches(pool2, ddp):
    pool2.run(switched, ["sharded", "ddp", "replicated", "sharded"], training.SGD, "plain", ddp)


@told
def parted(rank, world, begin):
    """A step on each rank's own gradients parts replicas, as under plain DDP, and no part of one is handed to all."""
    model, opt = training.build("Mlp", training.SGD, {})
    dear.attach(model, opt, compressor=Scripted({0: Setting(begin, SMALL), 2: Setting("sharded", SMALL)}))
    training.plain_step(model, opt, rank, 0)
    training.plain_step(model.module, opt, rank, 1)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=r"Ranks 0 and 1 disagree on the values of the parameter .*: load the same"):
        training.plain_step(model, opt, rank, 2)
    for one, other in zip(before, model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("begin", ["ddp", "replicated"])
def test_replicas_that_have_parted_are_not_mixed(pool2, begin):
    check_told(pool2, parted, begin)


def with_schedule(rank, world):
    """A learning-rate schedule, clipping, several forward passes a step, evaluation, and saved state."""
    results = []
    for attached in (False, True):
        model, opt = training.build("Mlp", ADAMW, {})
        settings = {2: Setting("ddp", 1.0), 4: Setting("replicated", SMALL), 6: Setting("sharded", SMALL)}
        engine = dear.attach(model, opt, compressor=Scripted(settings)) if attached else None
        schedule = optim.lr_scheduler.LinearLR(opt, total_iters=8)
        norms = []
        for step in range(10):
            (training.loss_of(model, rank, step) + training.loss_of(model, rank, step + 20)).backward()
            if attached:
                norms.append(float(engine.clip_grad_norm_(1e6)))
            else:
                norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)))
            opt.step()
            schedule.step()
            opt.zero_grad(set_to_none=False)
            with torch.no_grad():
                training.loss_of(model, rank, 99)
            if attached and step in (3, 5):
                engine.load_state_dict(engine.state_dict())
        results.append((norms, [param.clone() for param in model.parameters()]))
        if attached:
            engine.detach()
    (want, plain), (have, ours) = results
    assert have == pytest.approx(want)
    for one, other in zip(plain, ours, strict=True):
        assert torch.equal(one, other)


def test_what_a_training_script_does_besides(pool2):
    pool2.run(with_schedule)


def several(rank, world):
    """SGD for some parameters, AdamW for the rest: nothing is replicated, and plain DDP steps both."""
    results = []
    for attached in (False, True):
        model, both = owned_lists.build(owned_lists.sgd_and_adamw)
        settings = {2: Setting("owned", SMALL), 4: Setting("ddp", SMALL), 6: Setting("sharded", SMALL)}
        engine = dear.attach(model, both.optimizers, compressor=Scripted(settings)) if attached else None
        losses = [training.plain_step(model, both, rank, step) for step in range(9)]
        if attached:
            assert engine._steering.updates(compresses=False) == ["sharded", "owned", "ddp"]
            engine.detach()
        results.append((losses, owned_lists.values(model)))
    (want, plain), (have, ours) = results
    assert have == want
    for one, other in zip(plain, ours, strict=True):
        assert torch.equal(one, other)


def test_several_optimizers(pool2):
    pool2.run(several)


def into_compression(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    compressor = compress.PowerSGD(rank=2)
    settings = {2: Setting("replicated", 1.0, compressor), 5: Setting("sharded", SMALL)}
    engine = dear.attach(model, opt, compressor=Scripted(settings))
    sent, kinds = [], []
    for step in range(8):
        training.plain_step(model, opt, rank, step)
        sent.append(engine.stats()["bytes_sent"])
        kinds.append(engine.compressor)
    assert kinds == [None] * 2 + [compressor] * 3 + [None] * 3
    each = [after - before for before, after in pairwise(sent)]
    assert 0 < each[3] < each[-1], "bytes go on being counted, and compressed steps send fewer"
    engine.detach()
    return [param.detach().clone() for param in model.parameters()]


def test_compressors_come_and_go(pool2):
    first, second = pool2.run(into_compression)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other), "replicas parted"


def refused(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    with pytest.raises(ValueError, match="disagree on the script"):
        dear.attach(model, opt, compressor=Scripted({5: Setting("sharded", 1.0 + rank)}))
    with pytest.raises(TypeError, match="needs a compressor"):
        dear.attach(model, opt, compressor="automatic")
    engine = dear.attach(model, opt, compressor=Scripted({}), update="replicated")
    steering = engine._steering
    assert steering.updates(compresses=False) == steering.updates(compresses=True) == ["replicated"]
    engine.detach()
    engine = dear.attach(model, opt, compressor=Scripted({}))
    assert engine.plan is None and engine.update == "sharded"
    assert engine._steering.updates(compresses=False) == ["sharded", "owned", "replicated", "ddp"]
    engine.detach()
    engine = dear.attach(model, opt, compressor=Scripted({0: Setting("ddp", 1.0)}))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})  # of nobody's model, whatever the setting
    training.loss_of(model, rank, 0).backward()
    with pytest.raises(ValueError, match="that are not in the DDP module"):
        opt.step()
    del opt.param_groups[-1]
    opt.step()
    engine.detach()


def test_refusals(pool2):
    pool2.run(refused)
