"""A single rank: attaching changes nothing, and costs next to nothing."""

import copy
import io

import pytest
import torch
import training
from refusing import final, same
from rich.console import Console

import compress
import dear
from benchmarks.alone import show
from dear.integrations import dcp_sharded

ADAM = (torch.optim.AdamW, {"lr": 0.01})


def run(rank, update, steps, clip=None):
    model, opt = training.build("Mlp", ADAM, {})
    engine = dear.attach(model, opt, update=update) if update else None
    for step in range(steps):
        training.loss_of(model, rank, step).backward()
        if clip is not None and engine is not None:
            engine.clip_grad_norm_(clip)
        elif clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
    return model, opt, engine


def alone(rank, world, update, folder):
    model, opt, engine = run(rank, update, 3, clip=0.1)
    want, plain, _ = run(rank, None, 3, clip=0.1)
    same(final(model), final(want))
    stats = engine.stats()
    assert stats["steps"] == 3 and stats["bytes_sent"] == 0 and engine.update == update
    assert "forward" not in model.__dict__ and not model._get_ddp_logging_data().get("comm_hook")

    state = copy.deepcopy(engine.state_dict())
    torch.testing.assert_close(state["optimizer"]["state"], plain.state_dict()["state"], rtol=0, atol=0)
    dcp_sharded.save(f"{folder}/{update}", model, opt, engine)

    extra = torch.nn.Parameter(torch.zeros(3))  # of nobody's model: refused as on many ranks
    opt.add_param_group({"params": [extra]})
    training.loss_of(model, rank, 3).backward()
    with pytest.raises(ValueError, match="that are not in the DDP module"):
        opt.step()
    del opt.param_groups[-1]
    opt.step()
    opt.zero_grad()
    training.plain_step(want, plain, rank, 3)
    same(final(model), final(want))
    engine.detach()
    training.plain_step(model, opt, rank, 4)
    training.plain_step(want, plain, rank, 4)
    same(final(model), final(want))

    for load in (
        lambda *of: of[2].load_state_dict(state),
        lambda *of: dcp_sharded.load(f"{folder}/{update}", *of),
    ):
        other, other_opt, other_engine = run(rank, update, 0)
        other.load_state_dict(run(rank, None, 3, clip=0.1)[0].state_dict())
        load(other, other_opt, other_engine)
        for step in (3, 4):
            training.plain_step(other, other_opt, rank, step)
        same(final(other), final(want))
        other_engine.detach()


def compressed(rank, world):
    """A compressor changes training on a single rank, too."""
    model, opt = training.build("Mlp", training.SGD, {})
    with dear.attach(model, opt, compressor=compress.TopK(density=0.05)) as engine:
        training.plain_step(model, opt, rank, 0)
        assert engine.compressor.step == 1


def test_a_single_rank(pool1, tmp_path):
    for update in ("sharded", "owned", "replicated"):
        pool1.run(alone, update, str(tmp_path))
    pool1.run(compressed)


def test_table():
    times = {"ddp": [20.0, 21.0, 30.0], "dear:sharded": [20.1, 21.1, 30.1]}
    cell = {
        "plan": {"rounds": 3}, "user_s": None,
        "strategies": [{"name": name, "ms": ms, "calls": 100} for name, ms in times.items()],
    }  # fmt: skip
    assert show.beyond_ddp(cell) == {"ddp": 0.0, "dear:sharded": pytest.approx(0.1)}
    text = io.StringIO()
    show.show(cell, Console(file=text, width=120))
    assert "+0.100" in text.getvalue() and "+0.48" in text.getvalue()
