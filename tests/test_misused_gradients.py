"""Gradients that were never reduced, used twice, replaced, or not finite: right, or refused with a sentence."""

import math

import pytest
import torch
import training
from refusing import SMALL, both_modes, final, refused, same, trains_on_like_plain, warm
from torch import nn, optim

import dear


def wrong_order(rank, world, update, deferred):
    model, opt, engine = warm(rank, update)
    if not deferred:
        handle = opt.register_step_pre_hook(lambda *_: None)  # makes the whole update one
    before = final(model)
    with model.no_sync():
        training.loss_of(model, rank, 10).backward()
    with refused(RuntimeError, "was not reduced, since every backward pass"):
        opt.step()
    same(final(model), before)
    opt.zero_grad()
    trains_on_like_plain(rank, model, opt, 3)

    training.loss_of(model, rank, 6).backward()
    with model.no_sync():
        training.loss_of(model, rank, 7).backward()
    with refused(RuntimeError, "must be the one that DDP reduces"):
        opt.step()
    opt.zero_grad()
    trains_on_like_plain(rank, model, opt, 6)
    if not deferred:
        handle.remove()
    engine.detach()


@both_modes
@pytest.mark.parametrize("deferred", [True, False])
def test_local_gradients_are_never_applied(pool2, update, deferred):
    pool2.run(wrong_order, update, deferred)


def frozen(rank, world, update, part, in_place):
    """DDP waits for the buckets of what was frozen in mid-training, and has sent the others, or none."""
    for steps in (3, 0):  # at first there is no layout yet
        model, opt, engine = warm(rank, update, steps)
        opt.zero_grad(set_to_none=not in_place)
        getattr(model.module, part).requires_grad_(False)
        before = final(model)
        training.loss_of(model, rank, 8).backward()
        with refused(RuntimeError, f"The parameter {part}.* got no gradient in the last backward pass"):
            opt.step()
        same(final(model), before)
        engine.detach()


@pytest.mark.parametrize("in_place", [False, True], ids=["none", "zeros"])
@pytest.mark.parametrize("part", ["first", "last"])
@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_a_bucket_that_ddp_waits_for(pool2, update, part, in_place):
    pool2.run(frozen, update, part, in_place)


def twice(rank, world, update):
    def two_steps(model, optimizer, rank, number):
        """Without zero_grad() between them, the second step uses the same gradients again."""
        loss = training.loss_of(model, rank, number)
        loss.backward()
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    training.compare(rank, world, "Mlp", attach={**SMALL, "update": update}, step=two_steps)
    # Without gradients a step does nothing, as in plain torch; also when they were thrown away after backward.
    model, opt, engine = warm(rank, update)
    before = final(model)
    opt.step()
    training.loss_of(model, rank, 8).backward()
    opt.zero_grad()
    opt.step()
    same(final(model), before)
    trains_on_like_plain(rank, model, opt, 3)
    engine.detach()


@both_modes
def test_gradients_are_used_as_often_as_there_are_steps(pool2, update):
    pool2.run(twice, update)


def thrown_away(model, optimizer, rank, step):
    """A step that is not taken; its gradients are set to zero in place."""
    loss = training.loss_of(model, rank, step)
    loss.backward()
    if step % 3 != 1:
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return loss.item()


def zeroed(rank, world, update):
    for kind in (training.SGD, (optim.SGD, {"lr": 0.05, "foreach": False})):
        training.compare(rank, world, "Mlp", kind, attach={**SMALL, "update": update}, step=thrown_away, steps=9)


@both_modes
def test_gradients_thrown_away_in_place(pool2, update):
    pool2.run(zeroed, update)


def norm_of(grads: list[torch.Tensor]):
    return torch.stack([grad.norm() for grad in grads]).norm()


def read_below_python(rank, world, update, ddp):
    """Scripted functions and torch.vmap() reach a gradient past its class."""
    model, opt = training.build("Mlp", training.SGD, ddp)
    engine = dear.attach(model, opt, update=update, **SMALL)
    for step in range(2):
        training.plain_step(model, opt, rank, step)
    scripted = torch.jit.script(norm_of)
    readers = {
        "norm": lambda grad: scripted([grad]),
        "linalg_vector_norm": torch.vmap(torch.linalg.vector_norm),
        "mul_": lambda grad: torch.vmap(lambda row: row.mul_(2.0))(grad),
    }
    for name, read in readers.items():
        before = final(model)
        training.loss_of(model, rank, 2).backward()
        says = f"{name} was called on a .grad that is this worker's own"
        with pytest.warns(RuntimeWarning, match=says), pytest.raises(RuntimeError):
            read(model.module.first.weight.grad)
        opt.zero_grad()
        same(final(model), before)
    # What is zero on every rank may be read.
    training.loss_of(model, rank, 2).backward()
    opt.zero_grad(set_to_none=False)
    assert scripted([param.grad for param in model.parameters()]) == 0
    opt.zero_grad()
    trains_on_like_plain(rank, model, opt, 2)
    engine.detach()


@pytest.mark.parametrize("update", ["sharded", "owned"])
@pytest.mark.parametrize("ddp", [{}, {"find_unused_parameters": True}], ids=["", "finds unused"])
def test_gradients_in_shards_are_read_by_nobody(pool2, update, ddp):
    pool2.run(read_below_python, update, ddp)


def replaced(rank, world):
    def step(model, optimizer, rank, number):
        """Scales one gradient and takes another away."""
        loss = training.loss_of(model, rank, number)
        loss.backward()
        first, second = model.module.first, model.module.second
        first.weight.grad = first.weight.grad * 0.5
        second.bias.grad = None
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    training.compare(rank, world, "Mlp", attach={**SMALL, "update": "replicated"}, step=step)

    def own(model, optimizer, rank, number):
        loss = training.loss_of(model, rank, number)
        loss.backward()
        model.module.first.weight.grad = torch.full_like(model.module.first.weight, number)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    training.compare(rank, world, "Mlp", attach={**SMALL, "update": "sharded"}, step=own)
    model, opt, engine = warm(rank, "sharded")
    training.loss_of(model, rank, 3).backward()
    model.module.first.weight.grad = None
    with refused(RuntimeError, "first.weight was set to None"):
        opt.step()
    opt.zero_grad()
    trains_on_like_plain(rank, model, opt, 3)
    engine.detach()


def test_replaced_gradients_count_or_are_refused(pool2):
    pool2.run(replaced)


def read_gradients(rank, world):
    model, opt, engine = warm(rank, "sharded")
    training.loss_of(model, rank, 3).backward()
    params = list(model.parameters())
    grad = params[0].grad
    for read in (
        lambda: grad + 1,
        lambda: grad.add_(2),
        lambda: grad.clone(),
        lambda: grad.numpy(),
        lambda: float(grad.flatten()[0]),
        lambda: torch.isfinite(grad),
        lambda: grad.norm(2, dim=0),
    ):
        with refused(
            RuntimeError, r"this worker's own.*ask for norms of whole gradients \(p.grad.norm\(math.inf\) is not finite"
        ):
            read()
    for shown in (repr(grad), str(grad), f"{grad}", f"{grad:>80}"):
        assert "this worker's own gradient" in shown
    assert grad.shape == params[0].shape and grad.dtype == torch.float32
    opt.step()
    opt.zero_grad()
    trains_on_like_plain(rank, model, opt, 4)
    engine.detach()


def test_one_workers_own_gradient_is_not_taken_for_the_average(pool2):
    pool2.run(read_gradients)


def written_inside(rank, world, update):
    """A hook of the first layer changes the gradient of the last one, which is on its way. Plain DDP ignores it."""
    model, opt, engine = warm(rank, update)
    first, last = model.module.first.weight, model.module.last.weight

    def write(_):
        last.grad.mul_(2)

    handle = first.register_post_accumulate_grad_hook(write)
    with refused(RuntimeError, "Gradients .*written to"):
        training.plain_step(model, opt, rank, 3)
        engine.synchronize()
    handle.remove()
    engine.__exit__(RuntimeError, None, None)


@both_modes
def test_a_hook_that_writes_to_gradients_on_their_way(pool2, update):
    pool2.run(written_inside, update)


def looked_for_nan(rank, world, update):
    """The remedy of who wants to know whether a gradient is finite, as plain DDP would say it."""
    model, _ = training.build("Mlp", training.SGD, {})
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    with dear.attach(model, opt, update=update, **training.SMALL):
        for value, finite in ((1e30, True), (float("nan"), False), (float("inf"), False), (1.0, True)):
            (model(torch.ones(2, 16)).sum() * (value if rank == 1 else 1.0)).backward()
            for param in model.parameters():
                assert param.grad.norm(math.inf).isfinite().item() is finite, value
            opt.zero_grad()


@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_a_norm_says_whether_a_gradient_is_finite(pool2, update):
    pool2.run(looked_for_nan, update)


def pending_gradients(rank, world):
    """Replicated: .grad is the average, whoever reads it."""

    def step(model, optimizer, rank, number):
        loss = training.loss_of(model, rank, number)
        loss.backward()
        norm = sum(param.grad.norm() for param in model.parameters()).item()
        model.module.last.weight.grad.mul_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    training.compare(rank, world, "Mlp", attach={**SMALL, "update": "replicated"}, step=step)


def test_replicated_gradients_are_the_averages(pool2):
    pool2.run(pending_gradients)


# Gradients that are not finite


def poisoned(model, optimizer, rank, step):
    loss = training.loss_of(model, rank, step)
    if step == 4 and rank == 1:
        loss = loss * float("nan")
    if step == 3 and rank == 1:
        loss = loss + (model.module.last.bias * float("inf")).sum() * 0
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return 0.0


def not_finite(rank, world, update):
    """Passed on as DDP does it: to every rank alike."""
    want = training.train(rank, "Mlp", step=poisoned)[1]
    have = training.train(rank, "Mlp", step=poisoned, attach={**SMALL, "update": update})[1]
    assert any(value.isnan().any() for value in want.values())
    for name in want:
        assert torch.equal(want[name].nan_to_num(7.0), have[name].nan_to_num(7.0)), name


def clipping_not_finite(rank, world, update):
    model, opt, engine = warm(rank, update)
    loss = training.loss_of(model, rank, 3)
    (loss * float("inf") if rank == 1 else loss).backward()
    before = final(model)
    with pytest.raises(RuntimeError, match=r"not finite|non-finite"):
        engine.clip_grad_norm_(1.0, error_if_nonfinite=True)
    opt.zero_grad()
    same(final(model), before)
    trains_on_like_plain(rank, model, opt, 3)
    for kind in (1.0, 2.0, float("inf")):
        plain, _ = training.build("Mlp", training.SGD, {})
        plain.module.load_state_dict(model.module.state_dict())
        training.loss_of(plain, rank, 9).backward()
        training.loss_of(model, rank, 9).backward()
        want = nn.utils.clip_grad_norm_(plain.parameters(), 1e9, kind)
        torch.testing.assert_close(engine.clip_grad_norm_(1e9, kind), want)
        opt.zero_grad()
    engine.detach()


@both_modes
def test_gradients_that_are_not_finite_reach_every_rank(pool2, update):
    pool2.run(not_finite, update)


@both_modes
def test_clipping_gradients_that_are_not_finite(pool2, update):
    pool2.run(clipping_not_finite, update)
