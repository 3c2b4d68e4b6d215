"""When things move: the hook, fusion groups, the order of all-gathers, and each update exactly once."""

import doctest
import itertools

import pytest
import torch
import training
from holding import hold_updates, parameters_of_plain_ddp, release
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.optimizer import register_optimizer_step_post_hook
from training import SMALL

import dear
from dear import _fusion

MIB = 1 << 20
both_modes = pytest.mark.parametrize("update", ["sharded", "replicated"])


# Fusion


def test_the_examples_in_the_documentation_hold():
    assert doctest.testmod(_fusion).failed == 0
    assert doctest.testmod(_fusion).attempted > 0


def test_fusion_groups_cover_the_buckets_in_order():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        count = int(torch.randint(1, 40, (), generator=generator))
        buckets = torch.randint(1, 100, (count,), generator=generator).tolist()
        limit = int(torch.randint(1, 300, (), generator=generator))
        groups = _fusion.fuse(buckets, limit)
        assert sum(groups) == count and min(groups) >= 1
        assert groups[-1] == 1, "the first layers' group is a group of its own"
        start = 0
        sums = []
        for size in groups:
            sums.append(sum(buckets[start : start + size]))
            assert sums[-1] <= limit or size == 1, "a group is larger than asked for"
            start += size
        for first, second in itertools.pairwise(sums[:-1]):
            assert first + second > limit, "neighbours could have been one group"


def test_fusion_of_nothing_and_of_one():
    assert _fusion.fuse([], 10) == []
    assert _fusion.fuse([50], 10) == [1]
    assert _fusion.fuse([1, 1], 10) == [1, 1]


def test_ddp_buckets_are_finer_than_fusion_groups():
    for size in (1000, MIB // 2, MIB, 4 * MIB, 25 * MIB, 200 * MIB):
        bucket = _fusion.ddp_bucket_bytes(size)
        assert bucket <= size and (bucket >= min(size, MIB)) and (size < 2 * MIB or bucket < size)


def test_the_default_group_is_a_share_of_the_model():
    sizes = [_fusion.default_group_bytes(n * MIB) for n in (0, 1, 16, 64, 400, 10_000)]
    assert sizes == sorted(sizes) and sizes[0] == MIB and sizes[-1] == 25 * MIB


def test_all_gathers_follow_the_forward_pass():
    a, b, c, d = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    # A group is wanted when the first of its parameters is; what is never read comes last.
    assert _fusion.gather_order([[d], [a, c], [b]], {a: 0, b: 1, c: 2}) == [1, 2, 0]
    assert _fusion.gather_order([[a], [b]], {}) == [1, 0], "without observations the last bucket is the first layer"


# The hook


def hook_calls(rank, world, update):
    for options in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}):
        model, opt = training.build("Mlp", training.SGD, options)
        engine = dear.attach(model, opt, update=update, **SMALL)
        seen = []
        for step in range(12):
            training.plain_step(model, opt, rank, step)
            seen.append(engine._schedule.hook_calls.total)
        assert engine._schedule.hook_calls.with_gil == 0
        buckets = len(engine._attached.layout.buckets)
        assert buckets > 1 and seen[-1] - seen[-2] == buckets, "the hook was not called once for each bucket"
        engine.detach()


@both_modes
def test_the_hook_never_takes_the_interpreter_lock(pool2, update):
    pool2.run(hook_calls, update)


def finer(rank, world):
    """DDP's own default of 25 MiB does not decide."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(24)))  # 6 MiB
    model = DDP(net)
    opt = optim.SGD(net.parameters(), lr=0.01)

    def step():
        model(torch.randn(4, 256)).square().mean().backward()
        opt.step()
        opt.zero_grad()

    step(), step()
    engine = dear.attach(model, opt, bucket_cap_mb=1)
    for _ in range(3):
        step()
    sizes = [bucket.buffer.nbytes for bucket in engine._attached.layout.buckets]
    # DDP closes a bucket when it is full: it may be larger by one parameter.
    assert len(sizes) >= 5 and max(sizes) <= MIB + 256 * 256 * 4, sizes
    assert engine.stats()["fusion_groups"] >= 5
    engine.detach()
    assert model.bucket_bytes_cap == 25 * MIB, "DDP's own size comes back"


def test_large_buckets_of_ddp_are_made_finer(pool2):
    pool2.run(finer)


# Order


class Backwards(nn.Module):
    """Registers its layers in another order than it runs them."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 8)
        self.third = nn.Linear(16, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)

    def forward(self, x):
        return self.last(torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))


def order(rank, world, update):
    torch.manual_seed(0)
    model = DDP(Backwards())
    opt = optim.SGD(model.parameters(), lr=0.01)
    engine = dear.attach(model, opt, update=update, bucket_cap_mb=0.0005)
    for step in range(3):
        training.plain_step(model, opt, rank, step)
    engine.synchronize()
    engine.start_trace()
    training.plain_step(model, opt, rank, 3)
    events = engine.stop_trace()
    inner = model.module
    layers = [inner.first, inner.second, inner.third, inner.last]
    position = {param: index for index, layer in enumerate(layers) for param in layer.parameters()}
    wanted = [
        min(position[place.param] for place in engine._attached.layout.groups[group])
        for group in engine._attached.order
    ]
    assert len(wanted) > 3 and wanted == sorted(wanted), wanted
    gathers = sorted((e["start"], e["name"]) for e in events if e["lane"] == "all-gather")
    assert [name for _, name in gathers] == [f"fusion group {group}" for group in engine._attached.order]
    reduces = sorted((e["start"], e["name"]) for e in events if e["lane"] == "reduce-scatter")
    assert [name for _, name in reduces] == [f"fusion group {group}" for group in range(len(engine._attached.order))]
    assert all(e["start"] <= e["end"] for e in events)
    updates = [e["name"] for e in events if e["lane"] == "update"]
    assert sorted(updates) == sorted(name for _, name in gathers), "each group is updated once"
    engine.detach()


@both_modes
def test_all_gathers_run_in_forward_and_reduce_scatters_in_backward_order(pool2, update):
    pool2.run(order, update)


def other_order_on_each_rank(rank, world):
    """Ranks whose graphs differ still queue the same exchanges: rank 0's order counts."""

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(16, 16)
            self.two = nn.Linear(16, 16)
            self.last = nn.Linear(16, 8)

        def forward(self, x):
            first, second = (self.one, self.two) if rank == 0 else (self.two, self.one)
            return self.last(second(torch.tanh(first(x))))

    def run(attached):
        torch.manual_seed(0)
        model = DDP(Either())
        opt = optim.SGD(model.parameters(), lr=0.05)
        engine = dear.attach(model, opt, bucket_cap_mb=0.0005) if attached else None
        for step in range(6):
            training.plain_step(model, opt, rank, step)
        state = {name: value.clone() for name, value in model.module.state_dict().items()}
        if engine:
            engine.detach()
        return state

    want, have = run(False), run(True)
    assert all(torch.equal(want[name], have[name]) for name in want)


def test_ranks_that_run_their_layers_in_different_orders(pool2):
    pool2.run(other_order_on_each_rank)


# Updates


def captured(rank, world, update):
    """Hyper-parameters changed right after step() count from the next step on, also those held in tensors."""

    def step(model, optimizer, rank, number):
        group = optimizer.param_groups[0]
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(0.01 / (number + 1))
        else:
            group["lr"] = 0.01 / (number + 1)
        group["weight_decay"] = 0.1 * number
        loss = training.loss_of(model, rank, number)
        loss.backward()
        optimizer.step()
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(1e6)
        else:
            group["lr"] = 1e6
        group["weight_decay"] = 1e6
        group["betas"] = (0.8, 0.9 + 0.01 * number)
        optimizer.zero_grad()
        return loss.item()

    for rate in (0.01, torch.tensor(0.01)):
        training.compare(rank, world, "Mlp", (optim.AdamW, {"lr": rate}), attach={**SMALL, "update": update}, step=step)


@both_modes
def test_hyper_parameters_are_those_that_stood_at_step(pool2, update):
    pool2.run(captured, update)


def counted(rank, world, update):
    """Forwards between steps, of all kinds, apply nothing again; the last update is applied though nothing follows."""
    for steps in (1, 2, 3, 6):
        want = parameters_of_plain_ddp(rank, "Mlp", steps)[steps]
        model, opt = training.build("Mlp", training.SGD, {})
        engine = dear.attach(model, opt, update=update, **SMALL)
        for step in range(steps):
            training.plain_step(model, opt, rank, step)
            if step < steps - 1:
                for _ in range(3):
                    training.loss_of(model, rank, 100 + step)
                training.loss_of(model.module, rank, 100 + step)
                with model.no_sync():
                    training.loss_of(model, rank, 100 + step)
                engine.synchronize()
                engine.synchronize()
        engine.synchronize()
        for name, param in model.module.named_parameters():
            assert torch.equal(param, want[name]), (steps, name)
        assert engine.stats()["steps"] == steps
        engine.detach()


@both_modes
def test_every_update_is_applied_exactly_once(pool2, update):
    pool2.run(counted, update)


def with_hooks(rank, world, update):
    """Step hooks, an optimizer's own or everybody's, see one call for each step."""
    for register in ("own", "global"):
        calls = []
        model, opt = training.build("Mlp", training.SGD, {})
        engine = dear.attach(model, opt, update=update, **SMALL)
        if register == "own":
            handles = [opt.register_step_post_hook(lambda *_, calls=calls: calls.append(1))]
        else:
            handles = [register_optimizer_step_post_hook(lambda *_, calls=calls: calls.append(1))]
        for step in range(5):
            training.plain_step(model, opt, rank, step)
        want = parameters_of_plain_ddp(rank, "Mlp", 5)[5] if register == "own" else None
        for handle in handles:
            handle.remove()
        assert len(calls) == 5, (register, len(calls))
        state = model.module.state_dict()
        assert want is None or all(torch.equal(state[name], want[name]) for name in want)
        engine.detach()


@both_modes
def test_step_hooks_run_once_per_step(pool2, update):
    pool2.run(with_hooks, update)


def zero_grad_of_the_model(rank, world):
    """model.zero_grad() lists parameters and reads none: it does not wait."""
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, **SMALL)
    for step in range(3):
        training.plain_step(model, opt, rank, step)
    if rank == 1:
        hold_updates(engine, {engine._attached.order[-1]}, "zero_grad")
    training.loss_of(model, rank, 3).backward()
    opt.step()
    model.zero_grad()
    model.module.zero_grad()
    assert all(param.grad is None for param in engine._attached.params)
    if rank == 0:
        assert engine._attached.native.gathering()
        release("zero_grad")
    engine.detach()


def test_zero_grad_of_the_model_does_not_wait(pool2):
    pool2.run(zero_grad_of_the_model)


def counters(rank, world, update):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    for step in range(3):
        training.plain_step(model, opt, rank, step)
    before = engine.stats()["bytes_sent"]
    for step in range(3, 5):
        training.plain_step(model, opt, rank, step)
    engine.synchronize()
    stats = engine.stats()
    gradient = sum(flat.nbytes for flat in engine._attached.layout.full)
    assert abs((stats["bytes_sent"] - before) / 2 - gradient) <= 2 * stats["fusion_groups"], (
        "2 (P-1)/P of the gradients"
    )
    assert stats["steps"] == 5 and engine.update == update
    assert stats["exposed_ms"] == pytest.approx(stats["wait_reduce_scatter_ms"] + stats["wait_all_gather_ms"])
    engine.detach()


@both_modes
def test_counters(pool2, update):
    pool2.run(counters, update)


def held_memory(rank, world, update):
    """Steps are counted that waited for everything because somebody held a parameter's memory."""
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    for step in range(3):
        training.plain_step(model, opt, rank, step)
    assert engine.stats()["alias_waits"] == 0
    held = model.module.state_dict()
    for step in range(3, 5):
        training.plain_step(model, opt, rank, step)
    assert engine.stats()["alias_waits"] == 2
    del held
    training.plain_step(model, opt, rank, 5)
    assert engine.stats()["alias_waits"] == 2
    engine.detach()


@both_modes
def test_steps_that_wait_for_aliases_are_counted(pool2, update):
    pool2.run(held_memory, update)
