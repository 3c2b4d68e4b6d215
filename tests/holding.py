"""Rank 1 held back at a chosen place until rank 0 lets go: what rank 0 does meanwhile is surely too early."""

import time
from datetime import timedelta

import training
from torch.distributed import distributed_c10d as c10d
from training import SMALL

import dear

PATIENCE = timedelta(seconds=100)  # a test in which nobody lets go fails, and does not hang
HEAD_START = 0.05  # seconds that rank 0 has to go wrong in after it has let go
WARM = 3  # steps after which DDP's buckets and our groups stay as they are


def warm(rank, name, update, ddp=None, optimizer=training.SGD):
    """A model in steady state under the engine."""
    model, opt = training.build(name, optimizer, ddp or {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    for step in range(WARM):
        training.plain_step(model, opt, rank, step)
    return model, opt, engine


def hold(tag):
    """Blocks until another rank calls ``release(tag)``, and a little longer."""
    c10d._get_default_store().wait([f"holding/{tag}"], PATIENCE)
    time.sleep(HEAD_START)


def release(tag):
    """Lets go whoever is held at ``tag``."""
    c10d._get_default_store().set(f"holding/{tag}", "go")


def step_ahead(rank, model, optimizer, engine, step, tag):
    """One training step that rank 0 leaves while none of its all-gathers can have ended: rank 1 is held at ``tag``.

    With sharded updates the all-gathers need rank 1's step; with replicated ones they need its backward.
    """
    loss = training.loss_of(model, rank, step)
    if rank == 1 and engine.update == "replicated":
        hold(tag)
    loss.backward()
    if rank == 1 and engine.update != "replicated":
        hold(tag)
    optimizer.step()
    optimizer.zero_grad()


def hold_updates(engine, groups, tag):
    """Sharded: this rank's next step is held at ``tag`` before it updates and gathers the first of ``groups``."""
    update = engine._update
    step, run = update.step, update._run

    def run_held(optimizer, group):
        if group is None or group in groups:
            del update._run
            hold(tag)
        run(optimizer, group)

    def step_held(found, optimizer):
        del update.step
        # Or groups would be updated as they come, and not in the order of gathering.
        engine._attached.scheduler.synchronize()
        update._run = run_held
        step(found, optimizer)

    update.step = step_held


def parameters_of_plain_ddp(rank, model, steps, optimizer=training.SGD, ddp=None):
    """The parameters of plain DDP before any step and after each of ``steps`` steps, by name."""
    wrapped, opt = training.build(model, optimizer, ddp or {})
    history = [{name: value.clone() for name, value in wrapped.module.state_dict().items()}]
    for step in range(steps):
        training.plain_step(wrapped, opt, rank, step)
        history.append({name: value.clone() for name, value in wrapped.module.state_dict().items()})
    return history
