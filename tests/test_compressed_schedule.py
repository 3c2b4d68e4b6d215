"""Compression under the DeAR schedule: the same training as with the plain hook, only later."""

import copy
import os
import re

import models
import pytest
import torch
import training
from compressing import KINDS, dense_in_parts, kept
from own_compressors import RandomK
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import run_workers

import compress
import dear

SMALL = 0.02  # MiB: several buckets in these models
KINDS = {
    **KINDS,
    "parts": lambda **o: dense_in_parts(500, **o),
    "random": lambda **o: RandomK(0.25, **o),
    "dense": lambda **o: compress.Dense(**o),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


def make(kind, **options):
    """A compressor that compresses even the small matrices of the tests' models."""
    return KINDS[kind](**({"min_compression_ratio": 0.2} | options))


def build(kind, model, scheduled, ddp=None, optimizer=training.SGD, **options):
    """A DDP module, its optimizer, a compressor, and the engine if it is scheduled."""
    wrapped, opt = training.build(model, optimizer, {"bucket_cap_mb": SMALL, **(ddp or {})})
    # The first step of a plain hook goes out in DDP's first buckets, which under the schedule are none.
    compressor = make(kind, **({"start_step": 1} | options))
    if not scheduled:
        compress.register(wrapped, compressor)
        return wrapped, opt, compressor, None
    return wrapped, opt, compressor, dear.attach(wrapped, opt, compressor=compressor, bucket_cap_mb=SMALL)


def train(rank, kind, model, scheduled, steps=6, **options):
    """Losses, final parameters and the compressor's state of some steps."""
    wrapped, opt, compressor, engine = build(kind, model, scheduled, **options)
    losses = [training.plain_step(wrapped, opt, rank, step) for step in range(steps)]
    params = {name: value.clone() for name, value in wrapped.module.state_dict().items()}
    state = compressor.state_dict()
    if engine is not None:
        engine.detach()
    return losses, params, state


def same_training(rank, world, kind):
    for model, options in [
        ("Mlp", {}),
        ("Tied", {}),
        ("Attention", {}),
        ("Convolution", {}),
        ("MixedTypes", {}),
        ("Mlp", {"optimizer": (torch.optim.AdamW, {"lr": 0.01})}),
        ("Mlp", {"start_step": 3}),
        ("Mlp", {"error_feedback": False}),
        ("Unused", {"ddp": {"find_unused_parameters": True}}),
    ]:
        if kind in ("bf16", "parts") and "error_feedback" in options:
            continue  # that is kind "dense"
        want = train(rank, kind, model, False, **options)
        have = train(rank, kind, model, True, **options)
        assert have[0] == want[0], (model, options)
        for name, value in want[1].items():
            assert torch.equal(have[1][name], value), (model, options, name)
        for name, error in want[2]["errors"].items():
            assert torch.equal(have[2]["errors"][name], error), (model, options, name)
        assert have[2]["step"] == want[2]["step"] == 6


@each_kind
def test_same_training_as_with_the_plain_hook(pool2, kind):
    pool2.run(same_training, kind)


def replicas(rank, world, kind):
    _, params, _ = train(rank, kind, "Mlp", True)
    everyones = [None] * world
    torch.distributed.all_gather_object(everyones, params)
    for other in everyones:
        assert all(torch.equal(other[name], value) for name, value in params.items())


@each_kind
def test_replicas_stay_the_same_on_four_ranks(pool4, kind):
    pool4.run(replicas, kind)


def resume(rank, world, kind):
    wrapped, opt, _, engine = build(kind, "Mlp", True)
    for step in range(4):
        training.plain_step(wrapped, opt, rank, step)
    saved, weights = copy.deepcopy((engine.state_dict(), wrapped.module.state_dict()))  # as a file would hold it
    want = [training.plain_step(wrapped, opt, rank, step) for step in range(4, 8)]
    # In a new process, as it were.
    fresh, fresh_opt, _, fresh_engine = build(kind, "Mlp", True, seed=7)
    fresh.module.load_state_dict(weights)
    fresh_engine.load_state_dict(copy.deepcopy(saved))  # torch takes over the tensors it is given
    assert [training.plain_step(fresh, fresh_opt, rank, step) for step in range(4, 8)] == want
    # In the engine that has gone on: its buckets are known already.
    wrapped.module.load_state_dict(weights)
    engine.load_state_dict(saved)
    assert [training.plain_step(wrapped, opt, rank, step) for step in range(4, 8)] == want
    for one in (engine, fresh_engine):
        one.detach()


@each_kind
def test_resume_bit_for_bit(pool2, kind):
    pool2.run(resume, kind)


def spoil(model, rank, step):
    """A backward pass in which rank 1's gradients are not finite."""
    loss = training.loss_of(model, rank, step)
    (loss * (torch.nan if rank == 1 else 1.0)).backward()


def bad_gradients(rank, world, kind):
    for policy in ("raise", "skip", "propagate"):
        wrapped, opt, compressor, engine = build(kind, "Mlp", True, nonfinite=policy)
        for step in range(3):
            training.plain_step(wrapped, opt, rank, step)
        before, params = kept(compressor), [p.detach().clone() for p in wrapped.parameters()]
        spoil(wrapped, rank, 3)
        if policy == "raise":
            with pytest.raises(RuntimeError, match=r"On some rank a gradient in bucket .* is not finite"):
                opt.step()
        elif policy == "skip":
            opt.step()
            assert all(p.grad is None for p in wrapped.parameters())
        else:
            assert any(p.grad.isnan().any() for p in wrapped.parameters())
        opt.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(params, wrapped.parameters(), strict=True))
        after = kept(compressor)
        if policy == "raise":
            assert all(error.isfinite().all() for error in after.values())
        else:
            assert all(torch.equal(error, before[name]) for name, error in after.items())
        training.plain_step(wrapped, opt, rank, 4)
        assert all(p.isfinite().all() for p in wrapped.parameters())
        engine.detach()


@each_kind
def test_bad_gradients(pool2, kind):
    pool2.run(bad_gradients, kind)


def bad_gradients_at_the_end(rank, world):
    """detach() hands them over as the plain hook would have left them."""
    for policy in ("raise", "skip", "propagate"):
        wrapped, opt, compressor, engine = build("acp", "Mlp", True, nonfinite=policy)
        training.plain_step(wrapped, opt, rank, 0)
        before = kept(compressor)
        spoil(wrapped, rank, 1)
        if policy == "raise":
            with pytest.raises(RuntimeError, match="is not finite"):
                engine.detach()
            opt.zero_grad()
            training.plain_step(wrapped, opt, rank, 2)
        engine.detach()
        if policy == "skip":
            assert all(p.grad is None for p in wrapped.parameters())
        elif policy == "propagate":
            assert all(p.grad.isnan().all() for p in wrapped.parameters())
        if policy != "raise":
            assert all(torch.equal(error, before[name]) for name, error in kept(compressor).items())
        assert all(p.isfinite().all() for p in wrapped.parameters())


def test_bad_gradients_at_the_end(pool2):
    pool2.run(bad_gradients_at_the_end)


def grad_scaler(rank, world):
    wrapped, opt, _, engine = build("acp", "Mlp", True, nonfinite="propagate")
    scaler = torch.amp.GradScaler(place().type, init_scale=4.0)
    for step in range(5):
        before = [p.detach().clone() for p in wrapped.parameters()]
        scaler.scale(training.loss_of(wrapped, rank, step) * (torch.inf if step == 3 and rank == 0 else 1)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        changed = any(not torch.equal(a, b) for a, b in zip(before, wrapped.parameters(), strict=True))
        assert changed == (step != 3), step
    assert scaler.get_scale() == 2.0
    engine.detach()


def test_grad_scaler(pool2):
    pool2.run(grad_scaler)


def clipping(rank, world):
    """The aggregate is clipped, as after the plain hook."""
    results = []
    for scheduled in (False, True):
        wrapped, opt, _, engine = build("acp", "Mlp", scheduled)
        for step in range(5):
            training.loss_of(wrapped, rank, step).backward()
            if engine is not None:
                engine.clip_grad_norm_(0.1)
            else:
                torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
        results.append([p.detach().clone() for p in wrapped.parameters()])
        if engine is not None:
            engine.detach()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_clipping(pool2):
    pool2.run(clipping)


def statistics(rank, world):
    said = []
    for scheduled in (False, True):
        wrapped, opt, compressor, engine = build("acp", "Mlp", scheduled)
        for step in range(4):
            if step == 3:
                compressor.measure()
            training.plain_step(wrapped, opt, rank, step)
        stats = compressor.stats()
        said.append([stats[key] for key in ("steps", "bytes_sent", "dense_bytes", "error_norm", "vnmse")])
        for told in (stats, engine.stats() if engine is not None else stats):
            # On a GPU the host only queues what is computed.
            assert place().type == "cuda" or (told["encode_ms"] > 0 and told["decode_ms"] > 0)
        if engine is not None:
            assert engine.update == "replicated"
            engine.detach()
    assert said[0] == said[1], said
    assert said[0][4] > 0
    assert 0 < said[0][1] < said[0][2]


def test_statistics(pool2):
    pool2.run(statistics)


def without_the_interpreter(rank, world):
    for kind in KINDS:
        if kind == "random":
            continue
        wrapped, opt, compressor, _ = build(kind, "Mlp", False)
        for step in range(6):
            training.plain_step(wrapped, opt, rank, step)
        calls = compressor.binding.calls
        assert calls.total >= 6 and calls.with_gil == 0, kind


def test_the_native_hook_never_holds_the_interpreter_lock(pool2):
    pool2.run(without_the_interpreter)


def life(rank, world):
    """A compressor goes from engine to hook with its state; the state of a detached one can be saved."""
    wrapped, opt, compressor, engine = build("acp", "Mlp", True)
    for step in range(4):
        training.plain_step(wrapped, opt, rank, step)
    engine.detach()
    assert compressor.state_dict()["step"] == 4
    compress.register(wrapped, compressor)
    training.plain_step(wrapped, opt, rank, 4)
    assert compressor.step == 5


def test_detached_compressors_go_on(pool2):
    pool2.run(life)


def refusals(rank, world):
    wrapped, opt = training.build("Mlp", training.SGD, {})
    with pytest.raises(ValueError, match='update="sharded" gathers updated parameters'):
        dear.attach(wrapped, opt, compressor=compress.ACPSGD(), update="sharded")
    with pytest.raises(TypeError, match=r"dear.attach\(\) needs a compressor, not the string 'acp': make one, such"):
        dear.attach(wrapped, opt, compressor="acp")
    with pytest.raises(TypeError, match=r"^compress.ACPSGD is a class; pass an instance, such as compress.ACPSGD\(\)"):
        dear.attach(wrapped, opt, compressor=compress.ACPSGD)
    with pytest.raises(ValueError, match=r"Ranks 0 and 1 disagree on the compressor's rank \(1 and 2\)"):
        dear.attach(wrapped, opt, compressor=compress.ACPSGD(rank=1 + rank))
    for ours, without in (("None and 'ACPSGD'", 0), ("'ACPSGD' and None", 1)):
        with pytest.raises(ValueError, match=f"Ranks 0 and 1 disagree on the compressor \\({ours}\\): every rank must"):
            dear.attach(wrapped, opt, update="replicated", compressor=None if rank == without else compress.ACPSGD())
    taken = compress.ACPSGD()
    compress.register(DDP(models.Mlp()), taken)
    with pytest.raises(RuntimeError, match="serves a model already"):
        dear.attach(wrapped, opt, compressor=taken)
    engine = dear.attach(wrapped, opt, compressor=compress.ACPSGD())
    with pytest.raises(RuntimeError, match="With a compressor the fusion groups are DDP's buckets"):
        engine.bucket_cap_mb = 4
    engine.detach()


def test_refusals(pool2):
    pool2.run(refusals)


def dead_peer(rank, world, kind):
    wrapped, opt, _, _ = build(kind, "Mlp", True)
    for step in range(3):
        training.plain_step(wrapped, opt, rank, step)
    if rank == 1:
        os._exit(3)
    with pytest.raises(RuntimeError) as caught:
        for step in range(3, 6):
            training.plain_step(wrapped, opt, rank, step)
    return str(caught.value)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("acp", "power", "sign")] + ["random"]
)
def test_a_dead_peer_is_an_error(kind):
    message, _ = run_workers(dead_peer, 2, kind, group_timeout=10, expect_dead={1})
    where = r"(reduce-scatter|all-to-all|all-gather) of (the finiteness check of )?fusion group \d+( to \d+)?"
    assert re.match(rf"Rank 1 .+ during the {where}, as rank 0 saw it\.", message), message
