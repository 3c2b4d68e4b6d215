"""Error feedback under the DeAR schedule, where DDP leaves parameters out: what nobody applies is not lost."""

from typing import ClassVar

import pytest
import torch
from compressing import KINDS, Sometimes, gradients, kept
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import dear

SMALL = 0.02  # MiB: a bucket for each parameter
each_kind = pytest.mark.parametrize("kind", KINDS)


class Sparing:
    """Training in which some ranks do not use one of two parameters, with what was given, applied and kept."""

    SHAPES: ClassVar = {"often": (200, 100), "rarely": (100, 200)}

    def __init__(self, kind):
        self.model = DDP(Sometimes(self.SHAPES).to(place()), bucket_cap_mb=SMALL, find_unused_parameters=True)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.compressor = KINDS[kind](min_compression_ratio=0.2)
        self.engine = dear.attach(self.model, self.opt, compressor=self.compressor, bucket_cap_mb=SMALL)
        self.balance = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.SHAPES.items()}

    def backward(self, rank, world, step, users):
        """One backward pass, in which only the ranks ``users`` use the second parameter."""
        given = [gradients(r, step, self.SHAPES) for r in range(world)]
        for r, grads in enumerate(given):
            if r not in users:
                del grads["rarely"]
            for name, grad in grads.items():
                self.balance[name] += grad.double()
        self.model({name: grad.to(place()) for name, grad in given[rank].items()}).backward()

    def params(self):
        """Copies of the parameters, in float64 and on the host."""
        return {name: p.detach().cpu().double() for name, p in self.model.module.named_parameters()}

    def take(self, world, results):
        """These were the results; nothing else may be missing."""
        errors = kept(self.compressor)
        for name, result in results.items():
            self.balance[name] -= world * result
        for name, balance in self.balance.items():
            lost = (balance.flatten() - errors[name]).abs().max()
            assert lost < 1e-4, (name, float(lost))


def unused(rank, world, kind, at_once):
    """What no rank applies goes back to the error feedback, once: with clipping, whose norm counts what is applied."""
    run = Sparing(kind)
    if at_once:
        run.opt.register_step_pre_hook(lambda *_: None)
    for step, users in enumerate([(0, 1), (), (1,), (), (), (0, 1)]):
        before = run.params()
        run.backward(rank, world, step, users)
        limit = 1e6 if step % 2 else 10.0
        clipped = min(1.0, limit / (float(run.engine.clip_grad_norm_(limit)) + 1e-6))
        run.opt.step()
        run.opt.zero_grad()
        after = run.params()
        assert users or torch.equal(before["rarely"], after["rarely"])
        run.take(world, {name: (before[name] - after[name]) / clipped for name in before})
    run.engine.detach()


@pytest.mark.parametrize("at_once", [False, True])
@each_kind
def test_unused_parameters_keep_their_error_also_under_clipping(pool2, kind, at_once):
    pool2.run(unused, kind, at_once)


def thrown_away(rank, world, kind):
    """Gradients are thrown away before a step, without one, or not used before detach()."""
    run = Sparing(kind)
    for step in range(8):
        run.backward(rank, world, step, () if step % 2 else (0, 1))
        results = {name: p.grad.double() for name, p in run.model.module.named_parameters() if p.grad is not None}
        assert ("rarely" in results) == (step % 2 == 0)
        if step < 7:
            run.opt.zero_grad()
        if step < 3:
            run.opt.step()
        elif step < 7:
            run.model(gradients(rank, 0, run.SHAPES))
        else:
            run.engine.detach()
        run.take(world, results)


@each_kind
def test_unused_parameters_keep_their_error_when_gradients_are_thrown_away(pool2, kind):
    pool2.run(thrown_away, kind)
