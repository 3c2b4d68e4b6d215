"""Clipping and scaling as torch does them, on gradients that exist in shards: plain DDP's result, on every rank."""

import pytest
import torch
import training
from refusing import SMALL, final, refused, same, trains_on_like_plain, warm
from torch import nn

NORMS = (2.0, 1.0, 3.0, float("inf"), float("-inf"), 0.0)
ADAM = (torch.optim.AdamW, {"lr": 0.01})
FUSED = (torch.optim.AdamW, {"lr": 0.01, "fused": True})


def by_hand(params, bound):
    norm = torch.stack([p.grad.detach().data.norm(2) for p in params]).norm(2)
    for p in params:
        p.grad.data.mul_(bound / max(norm, bound))
    return norm


def in_two_halves(params, bound):
    norm = nn.utils.get_total_norm([p.grad for p in params])
    nn.utils.clip_grads_with_norm_(params, bound, norm)
    return norm


def layer_by_layer(params, bound):
    return torch.stack([nn.utils.clip_grad_norm_(p, bound / 3) for p in params]).sum()


def by_foreach(params, bound):
    norms = torch._foreach_norm([p.grad for p in params], 2.0)
    total = torch.linalg.vector_norm(torch.stack(norms))
    torch._foreach_mul_([p.grad for p in params], (bound / (total + 1e-6)).clamp(max=1.0))
    return total


CLIPS = {
    "torch": lambda params, bound: nn.utils.clip_grad_norm_(params, bound),
    "torch, norm inf": lambda params, bound: nn.utils.clip_grad_norm_(params, bound / 8, float("inf")),
    "some": lambda params, bound: nn.utils.clip_grad_norm_(params[1:4], bound),
    "in two halves": in_two_halves,
    "layer by layer": layer_by_layer,
    "by hand": by_hand,
    "by foreach": by_foreach,
}


def clipping(name):
    def step(model, optimizer, rank, number):
        loss = training.loss_of(model, rank, number)
        loss.backward()
        norm = CLIPS[name](list(model.parameters()), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()

    return step


def clipped(rank, world):
    for name in CLIPS:
        for model, kind in (("Mlp", training.SGD), ("Convolution", training.SGD), ("MixedTypes", ADAM)):
            attach = {**SMALL, "update": "sharded"}
            want = training.train(rank, model, kind, step=clipping(name))
            have = training.train(rank, model, kind, step=clipping(name), attach=attach)
            torch.testing.assert_close(have[0], want[0], msg=name)
            for key, value in want[1].items():
                torch.testing.assert_close(have[1][key], value, msg=f"{name}: {model}: {key}")


@pytest.mark.parametrize("pool", ["pool2", "pool3"])
def test_norms_are_clipped_as_torch_clips_them(pool, request):
    request.getfixturevalue(pool).run(clipped)


def norms(rank, world):
    model, _, engine = warm(rank, "sharded")
    plain, _ = training.build("Mlp", training.SGD, {})
    plain.module.load_state_dict(model.module.state_dict())
    for each in (plain, model):
        training.loss_of(each, rank, 5).backward()
    pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
    for order in NORMS:
        for have, want in pairs:
            expected = torch.linalg.vector_norm(want.grad, order)
            torch.testing.assert_close(have.grad.norm(order), expected)
            torch.testing.assert_close(torch.norm(have.grad, p=order), expected)
            torch.testing.assert_close(torch.linalg.vector_norm(have.grad, ord=order), expected)
        have = nn.utils.get_total_norm([p.grad for p, _ in pairs], order)
        torch.testing.assert_close(have, nn.utils.get_total_norm([p.grad for _, p in pairs], order))
    for number in (6, 7):  # nothing is changed in between: another pass has other norms all the same
        for each in (plain, model):
            each.zero_grad()
            training.loss_of(each, rank, number).backward()
        have, want = (nn.utils.get_total_norm([p.grad for p in each.parameters()]) for each in (model, plain))
        torch.testing.assert_close(have, want)
    sent = engine.stats()["bytes_sent"]
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]) > 0
    assert engine.stats()["bytes_sent"] == sent, "what is known was asked again"
    engine.detach()


def test_norms_are_those_of_the_averages(pool2, pool3):
    pool2.run(norms)
    pool3.run(norms)


def by_value(model, optimizer, rank, number):
    loss = training.loss_of(model, rank, number)
    loss.backward()
    nn.utils.clip_grad_value_(model.parameters(), 0.01)
    first, *others = model.parameters()
    first.grad /= 2
    torch._foreach_div_([p.grad for p in others], 4)
    torch._foreach_clamp_max_([p.grad for p in others], 0.001)
    others[0].grad.nan_to_num_(0.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def values(rank, world):
    training.compare(rank, world, "Mlp", attach={**SMALL, "update": "sharded"}, step=by_value)


def test_each_element_is_changed_as_in_plain_ddp(pool2):
    pool2.run(values)


def kept(clip):
    """A step is left out, so that its clipped gradients are added to."""

    def step(model, optimizer, rank, number):
        loss = training.loss_of(model, rank, number)
        loss.backward()
        clip(model, optimizer)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def torchs(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def engines(model, optimizer):
    engine = getattr(optimizer, "_dear_engine", None)
    engine.clip_grad_norm_(0.05) if engine else torchs(model, optimizer)


def values_kept(model, optimizer):
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def added_to(rank, world):
    attach = {**SMALL, "update": "sharded"}
    for clip in (torchs, engines):
        training.compare(rank, world, "Mlp", attach=attach, step=kept(clip), exact=False)
    with refused(RuntimeError, "was changed other than by a factor, and not zeroed"):
        training.train(rank, "Mlp", attach=attach, step=kept(values_kept))


def test_clipped_gradients_that_are_kept_are_added_to(pool2):
    pool2.run(added_to)


def eval_between(rank, world):
    """A forward pass between clipping and the step, whose graph nobody uses."""

    def step(model, optimizer, rank, number):
        loss = training.loss_of(model, rank, number)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        training.loss_of(model, rank, number + 100)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()

    training.compare(rank, world, "Mlp", attach={**SMALL, "update": "sharded"}, step=step, exact=False)


def test_a_forward_pass_after_clipping_changes_nothing(pool2):
    pool2.run(eval_between)


def alone(rank, world, how):
    model, opt, _ = warm(rank, "sharded")
    training.loss_of(model, rank, 3).backward()
    if rank == 0 and how == "clips":
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    elif rank == 0 and how == "checks":
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        scaler.unscale_(opt)
    opt.step()
    training.loss_of(model, rank, 4).backward()


@pytest.mark.parametrize("how", ["clips", "checks"])
def test_a_rank_that_asks_alone_gets_an_error(pool2, how):
    outcomes = pool2.run(alone, how, group_timeout=5.0, expect_dead=())
    assert all(isinstance(outcome, RuntimeError) for outcome in outcomes), outcomes
    assert any("of the gradients" in str(outcome) for outcome in outcomes), outcomes


def out_of_place(rank, world):
    model, opt, engine = warm(rank, "sharded")
    training.loss_of(model, rank, 3).backward()
    grad = model.module.first.weight.grad
    opt.zero_grad()
    with refused(RuntimeError, "The gradient of first.weight that was asked about no longer stands"):
        grad.norm()
    training.loss_of(model, rank, 3).backward()
    for ask in (
        lambda: grad.norm(dim=0),
        lambda: torch.linalg.vector_norm(grad, dtype=torch.float64),
        lambda: grad.mul_(torch.ones(37, 1)),
        lambda: grad.mul_(grad),
        lambda: torch._foreach_mul_([grad], [2.0]),
        lambda: torch._foreach_mul_([grad], [grad]),
    ):
        with refused(RuntimeError, "is this worker's own"):
            ask()
    opt.step()
    opt.zero_grad()
    trains_on_like_plain(rank, model, opt, 4)
    engine.detach()


def test_what_shards_cannot_answer_is_refused(pool2):
    pool2.run(out_of_place)


# GradScaler


def scaling(scaler, overflows, clip):
    def step(model, optimizer, rank, number):
        loss = training.loss_of(model, rank, number)
        if number in overflows and rank == 1:  # on one rank alone: the others must hear of it
            loss = loss * 1e38
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return scaler.get_scale()

    return step


def scaled(rank, world, kind, clip):
    def run(attach):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        return training.train(rank, "Mlp", kind, attach=attach, step=scaling(scaler, (3,), clip), steps=8)

    want, have = run(None), run({**SMALL, "update": "sharded"})
    assert have[0] == want[0], "another scale"
    assert want[0][3] < want[0][2], "no step has overflowed"
    for name, value in want[1].items():
        if clip or world > 2 or kind[1].get("fused"):  # its kernel rounds by an element's place in memory
            torch.testing.assert_close(have[1][name], value)
        else:
            assert torch.equal(have[1][name], value), name


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", [training.SGD, ADAM, FUSED], ids=["SGD", "AdamW", "fused"])
def test_grad_scaler(pool2, kind, clip):
    pool2.run(scaled, kind, clip)


def test_grad_scaler_with_three_ranks(pool3):
    pool3.run(scaled, ADAM, False)


def skipped(rank, world):
    """A step that overflows changes nothing, on no rank, and gathers nothing."""
    model, opt, engine = warm(rank, "sharded")
    before, sent = final(model), engine.stats()["bytes_sent"]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(training.loss_of(model, rank, 3) * (1e38 if rank else 1)).backward()
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    same(final(model), before)
    parameters = sum(p.nbytes for p in model.parameters())
    assert engine.stats()["bytes_sent"] - sent < 0.75 * parameters, "a reduce-scatter is half of them with two ranks"
    assert scaler.get_scale() == 2.0**9
    trains_on_like_plain(rank, model, opt, 3)
    engine.detach()


def test_one_decision_is_taken_before_anything_is_gathered(pool2):
    pool2.run(skipped)


def mixed(rank, world):
    """One gradient is the user's own, the others are in shards."""

    def step(model, optimizer, rank, number):
        loss = training.loss_of(model, rank, number)
        loss.backward()
        model.module.first.weight.grad = torch.full_like(model.module.first.weight, 0.01 * number)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=False)
        torch._foreach_norm([p.grad for p in model.parameters()])
        torch._foreach_mul_([p.grad for p in model.parameters()], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()

    training.compare(rank, world, "Mlp", attach={**SMALL, "update": "sharded"}, step=step, exact=False)


def test_gradients_of_ones_own_among_them(pool2):
    pool2.run(mixed)


def detached(rank, world):
    """What was clipped before detach() is what plain DDP would have there."""
    model, _, engine = warm(rank, "sharded")
    plain, plain_opt = training.build("Mlp", training.SGD, {})
    for step in range(3):
        training.plain_step(plain, plain_opt, rank, step)
    for each in (model, plain):
        training.loss_of(each, rank, 3).backward()
        nn.utils.clip_grad_norm_(each.parameters(), 0.05)
    engine.detach()
    for have, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(have.grad, want.grad)


def test_clipped_gradients_after_detach(pool2):
    pool2.run(detached)
