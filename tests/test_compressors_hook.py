"""Training through the hook: what DDP and its users do to gradients, and every refusal's sentence."""

import copy
import os
import pickle
import re
import time

import compressing
import models
import pytest
import torch
import torch.nn.functional as F
from compressing import KINDS, SHAPES, attach, backward, everyones, gradients, kept
from own_compressors import RandomK
from place import place
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import run_workers

import compress


def learn(rank: int, world: int, compressor: compress.Compressor | None) -> float:
    """The loss after some steps of regression, with the rank's own seed."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8)).to(place())
    torch.manual_seed(rank)
    model = DDP(net, bucket_cap_mb=0.05)
    if compressor is not None:
        compress.register(model, compressor)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(60):
        x = models.data(rank, step % 8, batch=32)[0].to(place())
        loss = F.mse_loss(model(x), torch.sin(2 * x[:, :8]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    states = everyones([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for other in states for a, b in zip(other, states[0], strict=True))
    return sum(losses[-8:]) / 8


def learns_like_dense(rank: int, world: int) -> None:
    dense = learn(rank, world, None)
    start = 0.5  # the variance of the target
    for kind, make in KINDS.items():
        loss = learn(rank, world, make())
        assert loss < start - 0.6 * (start - dense), (kind, loss, dense)


def test_learns_like_dense(pool2):
    pool2.run(learns_like_dense)


def accumulation(rank: int, world: int) -> None:
    """Under no_sync the hook later sees the sum."""
    for kind, make in KINDS.items():
        results = []
        for accumulate in (False, True):
            model = attach(make())
            for step in range(3):
                if accumulate:
                    model.zero_grad()
                    grads = {name: grad.to(place()) for name, grad in gradients(rank, step).items()}
                    with model.no_sync():
                        model({name: 0.25 * grad for name, grad in grads.items()}).backward()
                    model({name: 0.75 * grad for name, grad in grads.items()}).backward()
                    have = {name: p.grad.cpu() for name, p in model.module.named_parameters()}
                else:
                    have = backward(model, gradients(rank, step))
            results.append(have)
        if kind in ("acp", "power", "local", "bf16", "parts"):  # the others may choose otherwise in a near tie
            for name in SHAPES:
                torch.testing.assert_close(results[0][name], results[1][name], rtol=0.02, atol=0.02)


def test_accumulation(pool2):
    pool2.run(accumulation)


def all_models(rank: int, world: int) -> None:
    """Tied, frozen and unused parameters, checkpointing, mixed types, channels last: replicas stay the same."""
    for name in ("Tied", "Functional", "Attention", "Checkpointed", "Convolution", "Frozen", "MixedTypes", "Unused"):
        for named in (True, False):
            torch.manual_seed(0)
            net = getattr(models, name)().to(place())
            options = {"find_unused_parameters": True} if name == "Unused" else {}
            model = attach(compress.ACPSGD(rank=2, min_compression_ratio=1.1), named, net=net, **options)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            for step in range(4):
                x, y = (each.to(place()) for each in models.data(rank, step))
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            states = everyones([p.detach().clone() for p in net.parameters()])
            assert all(torch.equal(a, b) for other in states for a, b in zip(other, states[0], strict=True)), name


def test_all_models(pool2):
    pool2.run(all_models)


def bad_gradients(rank: int, world: int) -> None:
    """One NaN on one rank: the policy holds on all ranks, and the error feedback is as it was or finite."""
    for kind, make in [*KINDS.items(), ("plain bf16", lambda **o: compress.Dense(**o)), ("random", _random)]:
        for policy in ("raise", "skip", "propagate"):
            for where in ("second", "bias"):
                compressor = make(nonfinite=policy)
                model = attach(compressor)
                for step in range(2):
                    backward(model, gradients(rank, step))
                before = kept(compressor)
                grads = gradients(rank, 2)
                if rank == 1:
                    grads[where].view(-1)[7] = torch.nan
                    grads[where].view(-1)[8] = torch.inf
                if policy == "raise":
                    with pytest.raises(RuntimeError, match="is not finite"):
                        backward(model, grads)
                else:
                    have = backward(model, grads)
                    if policy == "skip":
                        assert have == {}, kind
                    else:
                        assert have[where].isnan().all(), (kind, where)
                    for name, error in kept(compressor).items():
                        assert torch.equal(error, before[name]), (kind, name)
                have = backward(model, gradients(rank, 3))
                assert all(grad.isfinite().all() for grad in have.values()), (kind, policy)
                assert all(error.isfinite().all() for error in kept(compressor).values())


def _random(**options) -> compress.Compressor:
    return RandomK(0.25, **options)


def test_bad_gradients(pool2):
    pool2.run(bad_gradients)


def grad_scaler(rank: int, world: int) -> None:
    model = attach(compress.ACPSGD(rank=2, nonfinite="propagate"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(place().type, init_scale=4.0)
    for step in range(4):
        grads = gradients(rank, step)
        if step == 2 and rank == 0:
            grads["first"][0, 0] = torch.inf
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model({name: grad.to(place()) for name, grad in grads.items()})).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert changed == (step != 2)
    assert scaler.get_scale() == 2.0


def test_grad_scaler(pool2):
    pool2.run(grad_scaler)


def test_options_out_of_range():
    for make, message in [
        (lambda: compress.TopK(density=0), r"density must be in \(0, 1\]"),
        (lambda: compress.TopK(density=1.5), r"density must be in \(0, 1\]"),
        (lambda: compress.TopK(slack=0.5), "slack must be 1 or more"),
        (lambda: compress.ACPSGD(rank=0), "rank must be a whole number from 1"),
        (lambda: compress.PowerSGD(rank=1000), "rank must be a whole number from 1"),
        (lambda: compress.PowerSGD(rank=2.5), "rank must be a whole number from 1"),
        (lambda: compress.SignSGD(vote="mode"), 'vote must be "mean" or "majority"'),
        (lambda: compress.SignSGD(vote="majority", error_feedback=True), "takes no error feedback"),
        (
            lambda: compress.Dense(torch.float32),
            "dtype must be torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.int4, torch.int3 or "
            "torch.int2, not torch.float32",
        ),
        (lambda: compress.ACPSGD(start_step=-1), "start_step must be"),
        (lambda: compress.ACPSGD(min_compression_ratio=0), "min_compression_ratio must be"),
        (lambda: compress.ACPSGD(nonfinite="ignore"), "nonfinite must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def misuse(rank: int, world: int) -> None:
    with pytest.raises(TypeError, match="needs a DistributedDataParallel module, not Prescribed"):
        compress.register(compressing.Prescribed(), compress.ACPSGD())
    for named, caller in ((True, r"compress.register\(\)"), (False, "compress.comm_hook")):
        for wrong, match in (
            ("acp", rf"^{caller} needs a compressor, not the string 'acp': make one, such as compress\.preset\("),
            (4, rf"^{caller} needs a compressor, such as compress.ACPSGD\(\), not int\.$"),
            (compress.ACPSGD, r"^compress.ACPSGD is a class; pass an instance, such as compress.ACPSGD\(\)\.$"),
            (RandomK, r"^RandomK is a class; pass an instance, such as RandomK\(\)\.$"),
        ):
            with pytest.raises(TypeError, match=match):
                backward(attach(wrong, named), gradients(rank, 0))
    taken = compress.ACPSGD()
    model = attach(taken)
    with pytest.raises(RuntimeError, match="has a communication hook already"):
        compress.register(model, compress.ACPSGD())
    with pytest.raises(RuntimeError, match="serves a model already"):
        attach(taken)
    with pytest.raises(ValueError, match="makes sparse gradients"):
        attach(compress.ACPSGD(), net=nn.Embedding(10, 10, sparse=True))
    net = compressing.Prescribed()
    net.sparse = True  # a name that modules use for something else
    backward(attach(compress.ACPSGD(), net=net), gradients(rank, 0))
    model = DDP(compressing.Prescribed())
    torch._dynamo.config.optimize_ddp = "python_reducer"
    try:
        with pytest.raises(ValueError, match="python_reducer"):
            compress.register(model, compress.ACPSGD())
    finally:
        torch._dynamo.config.optimize_ddp = True
    for named in (True, False):
        with pytest.raises(ValueError, match=r"Ranks 0 and 1 disagree on the compressor's rank \(1 and 2\)"):
            backward(attach(compress.ACPSGD(rank=1 + rank), named), gradients(rank, 0))


def on_one_rank(rank: int, world: int) -> None:
    """A rank that cannot take part says so, and none waits for it in vain."""
    taken, other, elsewhere = compress.ACPSGD(), compress.ACPSGD(), compress.ACPSGD()
    attach(taken)
    backward(attach(other), gradients(rank, 0))
    elsewhere.load_state_dict(other.state_dict() | {"layout": [["nowhere"]]})
    for wrong, kind, match in [
        (4, TypeError, r"not int \(on rank 1\)\.$"),
        (compress.ACPSGD, TypeError, r"^compress.ACPSGD is a class; .* \(on rank 1\)\.$"),
        (taken, RuntimeError, r"^This compressor serves a model already.* \(on rank 1\)\.$"),
        (elsewhere, ValueError, r"^The state loaded is of another model: it has no .* \(on rank 1\)\.$"),
    ]:
        model, good = DDP(compressing.Prescribed()), compress.ACPSGD()
        start = time.monotonic()
        with pytest.raises(kind, match=match):
            compress.register(model, wrong if rank == 1 else good)
        assert time.monotonic() - start < 80
        assert good.binding is None and good.process_group is None
        compress.register(model, good)
        backward(model, gradients(rank, 0))


def sparse(rank: int, world: int) -> None:
    net = nn.Embedding(10, 10, sparse=True)
    model = attach(compress.TopK(), named=False, net=net)
    with pytest.raises(ValueError, match="is sparse, and so compressed already"):
        model(torch.tensor([1, 2])).sum().backward()


def complex_numbers(rank: int, world: int) -> None:
    for named in (True, False):
        model = attach(compress.TopK(), named, net=compressing.Prescribed({"z": (50, 50)}, torch.complex64))
        with pytest.raises(ValueError, match="cannot be compressed: hold it as a real"):
            model({"z": torch.ones(50, 50)}).abs().backward()


def other_states(rank: int, world: int) -> None:
    first = compress.ACPSGD(rank=2)
    model = attach(first)
    backward(model, gradients(rank, 0))
    state = first.state_dict()
    for make, given, message in [
        (lambda: compress.PowerSGD(rank=2), state, "the state of ACPSGD, not of PowerSGD"),
        (lambda: compress.ACPSGD(rank=3), state, "saved with the options"),
        (lambda: compress.ACPSGD(rank=2), {"a": 1}, "not a compressor's state"),
        (lambda: compress.ACPSGD(rank=2), state | {"rank": 1 - rank}, f"the state of rank {1 - rank}"),
        (lambda: compress.ACPSGD(rank=2), state | {"world_size": 3}, "load all ranks' states"),
        (lambda: compress.ACPSGD(rank=2), [state, state], "not the states of all 2 ranks in order"),
    ]:
        with pytest.raises(ValueError, match=message):
            make().load_state_dict(given)
    for shapes, message in [
        ({**SHAPES, "first": (301, 50)}, "first had 15000 elements and now has 15050"),
        ({**SHAPES, "extra": (30, 30)}, "it has no parameter extra"),
    ]:
        other = compress.ACPSGD(rank=2)
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=message):
            attach(other, net=compressing.Prescribed(shapes))
    # What only one rank has is everybody's complaint.
    lonely = compress.ACPSGD(rank=2)
    if rank == 1:
        lonely.load_state_dict(state)
    with pytest.raises(ValueError, match="disagree on the compressor's step"):
        attach(lonely)


@pytest.mark.parametrize("case", [misuse, on_one_rank, sparse, complex_numbers, other_states])
def test_one_sentence_on_every_rank(pool2, case):
    pool2.run(case)


def lonely_survivor(rank: int, world: int, kind: str) -> str:
    model = attach(KINDS[kind]())
    for step in range(3):
        backward(model, gradients(rank, step))
    if rank == 1:
        os._exit(3)
    with pytest.raises(RuntimeError) as caught:
        backward(model, gradients(rank, 3))
    return str(caught.value)


@pytest.mark.parametrize("kind", [pytest.param("acp", marks=pytest.mark.slow), "sign"])
def test_a_dead_peer_is_an_error(kind):
    message, _ = run_workers(lonely_survivor, 2, kind, group_timeout=10, expect_dead={1})
    assert re.match(
        r"Rank 1 .+ during the (reduce-scatter|all-to-all|all-gather) of bucket \d+, as rank 0 saw it\.", message
    ), message


def tensors_of(state) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [tensor for value in state for tensor in tensors_of(value)] if isinstance(state, (list, tuple)) else []


def copies(rank: int, world: int) -> None:
    """A saved state does not change when training goes on."""
    for kind, make in KINDS.items():
        compressor = make()
        model = attach(compressor)
        backward(model, gradients(rank, 0))
        state = compressor.state_dict()
        before = [tensor.clone() for tensor in tensors_of(state)]
        assert before, kind
        backward(model, gradients(rank, 1))
        assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True)), kind


def test_saved_states_are_copies(pool2):
    pool2.run(copies)


def copied(rank, world):
    """By registration, and as DDP's own hook: a copy would have no hook."""
    hooked = DDP(compressing.Prescribed(SHAPES))
    compressor = compress.SignSGD()
    hooked.register_comm_hook(compressor, compress.comm_hook)
    for model in (attach(compress.SignSGD()), hooked):
        backward(model, gradients(rank, 0))
        for copy_of in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="A compressor cannot be copied or pickled"):
                copy_of(model)
        assert len(list(copy.deepcopy(model.module).parameters())) == len(SHAPES)


def test_a_copy_of_the_module_would_have_no_hook(pool2):
    pool2.run(copied)
