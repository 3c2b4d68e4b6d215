"""Parameters that leave an optimizer's groups and come back: their state waits for them, where it was."""

import pytest
import torch
import training
from silence import BOTH, EVERY, IN_SHARDS, WARM, check, check_told, silence, told

import dear

TAIL = "\n\nopt.zero_grad()\n\nfor step in range(5, 9): train(step)"
#: What is shown in the middle, by parameter and optimizer; in shards it may be refused.
STEPS = "note([float(opt.state[p]['step']) for p in params])"
ADAM = {"optimizer": ("AdamW", {"lr": 0.01})}
OUT = "group = opt.param_groups.pop(0)"
BACK = "opt.param_groups.insert(0, group)"

CASES = [
    *silence("a group out and back", f"{WARM}\n\n{OUT}\n\ntrain(3); train(4)\n\n{BACK}{TAIL}", EVERY, groups=2, **ADAM),
    *silence("a group out and back, pending",
             f"{WARM}\n\nahead(3)\n\n{OUT}\n\nopt.zero_grad(); ahead(4)\n\n{BACK}{TAIL}", EVERY, groups=2, **ADAM),
    *silence("a group out at once and back", f"attach()\n\n{OUT}\n\ntrain(0); train(1)\n\n{BACK}{TAIL}", EVERY,
             groups=2, **ADAM),
    *silence("a group out before and back", f"train(0); train(1)\n\n{OUT}\n\nattach()\n\ntrain(2); train(3)\n\n"
             f"{BACK}{TAIL}", EVERY, groups=2, **ADAM),
    *silence("a parameter out and back", f"{WARM}\n\nq = opt.param_groups[0]['params'].pop()\n\ntrain(3); train(4)\n\n"
             f"opt.param_groups[0]['params'].append(q){TAIL}", EVERY, **ADAM),
    *silence("a group out, read, and back",
             f"{WARM}\n\n{OUT}\n\ntrain(3)\n\n{STEPS}\n\ntrain(4)\n\n{BACK}\n\n{STEPS}{TAIL}", EVERY, IN_SHARDS,
             groups=2, **ADAM),
    *silence("a group out, detached, attached and back",
             f"{WARM}\n\n{OUT}\n\ntrain(3)\n\ndetach()\n\n{STEPS}\n\nattach()\n\ntrain(4)\n\n{BACK}{TAIL}", BOTH,
             groups=2, **ADAM),
    *silence("a group out, its state cleared, and back",
             f"{WARM}\n\n{OUT}\n\ntrain(3)\n\nopt.state.clear()\n\ntrain(4)\n\n{BACK}{TAIL}", EVERY, IN_SHARDS,
             groups=2, **ADAM),
    *silence("a parameter out behind backward, and clipped", f"{WARM}\n\nforward(3).backward()\n\n"
             f"q = opt.param_groups[0]['params'].pop()\n\nclip(0.01, float('inf'))\n\nopt.step(){TAIL}",
             (*EVERY, "owned", "switching"), **ADAM),
    *silence("a parameter out before forward, and clipped", "attach()\n\nq = opt.param_groups[0]['params'].pop()\n\n"
             f"forward(2).backward()\n\nclip(0.01, float('inf'))\n\nopt.step(){TAIL}",
             (*EVERY, "owned", "switching"), **ADAM),
    *silence("parameters whole, a group out and back", f"{WARM}\n\n{OUT}\n\ntrain(3); train(4)\n\n{BACK}{TAIL}",
             ("owned",), groups=2, optimizer=("Adafactor", {"lr": 0.01})),
]  # fmt: skip


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_state_waits_for_a_parameter_that_is_in_no_group(pool2, case, may_refuse):
    check(pool2, case, may_refuse)


KINDS = {"same": (torch.optim.AdamW, {"lr": 0.01}), "other": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})}


def moved(rank, update, kind, when, back):
    """Trains with two optimizers; before the step ``when`` a parameter goes from one to the other, and with ``back``
    it returns two steps later. The parameters, and what each optimizer has of each of them."""
    model, _ = training.build("Mlp", KINDS["same"], {})
    params = list(model.parameters())
    make, options = KINDS[kind]
    one, two = torch.optim.AdamW(params[:2], lr=0.01), make(params[2:], **options)
    first, second = one.param_groups[0]["params"], two.param_groups[0]["params"]
    engine = dear.attach(model, [one, two], update=update) if update else None
    for step in range(8):
        if step == when:
            second.append(first.pop())
        if back and step == when + 2:
            first.append(second.pop())
        training.loss_of(model, rank, step).backward()
        one.step(), two.step()
        one.zero_grad(), two.zero_grad()
    if engine is not None:
        engine.detach()
    return [p.detach() for p in params], [[dict(o.state.get(p, {})) for p in params] for o in (one, two)]


@told
def moves_alike(rank, world, *arguments):
    (want, states), (have, others) = moved(rank, None, *arguments), moved(rank, "sharded", *arguments)
    for number, (a, b) in enumerate(zip(want, have, strict=True)):
        assert torch.equal(a, b), f"parameter {number} differs by {(a - b).abs().max()}"
    for mine, theirs in zip(states, others, strict=True):
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert a.keys() == b.keys(), (number, a.keys(), b.keys())
            assert all(torch.equal(a[key], b[key]) for key in a), number


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_state_stays_with_the_optimizer_that_has_it(pool2, kind, when, back):
    check_told(pool2, moves_alike, kind, when, back)


@told
def saved(rank, world, update):
    model, opt = training.build("Mlp", KINDS["same"], {})
    engine = dear.attach(model, opt, update=update)
    for step in range(2):
        training.plain_step(model, opt, rank, step)
    opt.param_groups[0]["params"].pop()
    training.plain_step(model, opt, rank, 2)
    with pytest.raises(RuntimeError, match="AdamW has the state of parameters that none of its groups lists"):
        engine.state_dict()
    engine.detach()


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_state_that_cannot_be_named_is_not_saved_without_a_word(pool2, update):
    check_told(pool2, saved, update)
