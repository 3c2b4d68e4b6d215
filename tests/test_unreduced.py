"""Gradients that DDP does not reduce, or that a user has put into .grad: plain DDP's training, or one sentence."""

from __future__ import annotations

import pytest
from machine.case import Case
from machine.search import run
from silence import IN_SHARDS, WARM, check, pieces, silence

INNER = "F.mse_loss(net(x(88)), y(88)).backward()"
TAIL = "opt.step()\n\nopt.zero_grad()\n\ntrain(9)"
UNUSED = {"model": "Unused", "ddp": {"find_unused_parameters": True}}
BY_HAND = "params[{0}].grad = torch.full_like(params[{0}], 0.01)"
EVERY = ("sharded", "owned", "replicated", "compressed", "register")

#: Programs whose gradients are each rank's own: by parts of a refusal, where averages are in shards.
LOCAL = {
    "past DDP": (f"{WARM}\n\n{INNER}\n\n{TAIL}", "model.module"),
    "past DDP, at once": (f"attach()\n\n{INNER}\n\n{TAIL}", "model.module"),
    "past DDP, behind a pass that no step used":
        (f"{WARM}\n\nforward(7).backward()\n\nopt.zero_grad()\n\n{INNER}\n\n{TAIL}", "model.module"),
    "past DDP, then clipped": (f"{WARM}\n\n{INNER}\n\nclip(0.01, 2.0)\n\n{TAIL}", "model.module"),
    "under no_sync, behind a pass that no step used":
        (f"{WARM}\n\nforward(7).backward()\n\nopt.zero_grad()\n\nwith model.no_sync(): forward(8).backward()\n\n{TAIL}",
         "model.no_sync()"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["sharded", "owned"])
@pytest.mark.parametrize("name", LOCAL)
def test_local_gradients_are_not_mixed_in_shards(pool2, name, how):
    program, part = LOCAL[name]
    (outcome,) = run(pool2, [Case(how, program=pieces(program))])
    assert outcome.kind == "refused" and part in outcome.text, outcome


APART = {
    "by hand, before the first pass":
        ("attach()\n\nfor p in params: p.grad = torch.full_like(p, 0.01 * (1 + rank))\n\n"
         "opt.step(); opt.zero_grad(); train(1)", "The replicas differ after step 1"),
    "by hand": (f"{WARM}\n\nforward(3).backward()\n\nfor p in params: p.grad = torch.full_like(p, 0.01 * (1 + rank))"
                "\n\nopt.step()", "set, scaled or clamped"),
    "scaled": (f"{WARM}\n\nforward(3).backward()\n\nfor p in params: p.grad.mul_(0.5 + rank)\n\nopt.step()",
               "set, scaled or clamped"),
    "clamped": (f"{WARM}\n\nforward(3).backward()\n\nfor p in params: p.grad.clamp_(-0.1 * (1 + rank), 0.1)\n\n"
                "opt.step()", "set, scaled or clamped"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["sharded", "owned"])
@pytest.mark.parametrize("name", APART)
def test_what_ranks_do_otherwise_to_gradients_is_told(pool2, name, how):
    program, part = APART[name]
    (outcome,) = run(pool2, [Case(how, attach={"check_replicas": 1}, program=pieces(program))])
    assert outcome.kind == "refused" and part in outcome.text, outcome


@pytest.mark.parametrize("how", ["sharded", "owned"])
def test_what_all_ranks_do_alike_to_gradients_is_not(pool2, how):
    program = (
        f"{WARM}\n\nforward(3).backward()\n\n"
        f"for p in params[:: 1 - 2 * rank]: p.grad.mul_(0.5)\n\nclip(0.01, float('inf'))\n\n{TAIL}"
    )
    check(pool2, Case(how, attach={"check_replicas": 1}, program=pieces(program)), False)


CASES = [
    *silence("by hand", f"{WARM}\n\nforward(3).backward()\n\n{BY_HAND.format(0)}\n\n{TAIL}", EVERY),
    *silence("by hand, not zeroed",
             f"{WARM}\n\nforward(3).backward()\n\n{BY_HAND.format(0)}\n\nopt.step()\n\ninexact(); train(9)", EVERY,
             IN_SHARDS),
    *silence("by hand, in place of what went past DDP",
             f"{WARM}\n\n{INNER}\n\nfor p in params: p.grad = torch.full_like(p, 0.01)\n\n{TAIL}", EVERY),
    *silence("by hand, where something that went past DDP was zeroed",
             f"{WARM}\n\n{INNER}\n\nopt.zero_grad()\n\nfor p in params: p.grad = torch.full_like(p, 0.01)\n\n{TAIL}",
             EVERY),
    *silence("by hand, behind a forward pass that had no backward pass",
             f"{WARM}\n\nforward(3); forward(4).backward(); opt.step(); opt.zero_grad()\n\n"
             f"for p in params: p.grad = torch.full_like(p, 0.01)\n\n{TAIL}", EVERY),
    *silence("by hand, unused", f"{WARM}\n\nforward(3).backward()\n\n{BY_HAND.format(5)}\n\n{TAIL}", EVERY, **UNUSED),
    *silence("by hand, unused, clipped",
             f"{WARM}\n\nforward(3).backward()\n\n{BY_HAND.format(5)}\n\nclip(0.01, 2.0)\n\n{TAIL}", EVERY, **UNUSED),
    *silence("by hand, unused, not zeroed",
             f"{WARM}\n\nforward(3).backward()\n\n{BY_HAND.format(5)}\n\nopt.step()\n\ninexact(); train(9)", EVERY,
             IN_SHARDS, **UNUSED),
    *silence("by hand, frozen", f"{WARM}\n\nforward(3).backward()\n\n{BY_HAND.format(2)}\n\n{TAIL}", EVERY, IN_SHARDS,
             model="Frozen"),
    *silence("by hand, before the first pass", f"attach()\n\n{BY_HAND.format(0)}\n\n{TAIL}", EVERY),
    *silence("one optimizer's are zeroed before both are clipped",
             f"{WARM}\n\nforward(3).backward()\n\nopt.zero_grad(); clip(0.01, float('inf'))\n\nopt2.step()\n\n"
             "opt2.zero_grad(); train(9)", ("sharded", "owned"), second=("AdamW", {"lr": 0.01})),
    *silence("past DDP, zeroed", f"{WARM}\n\n{INNER}\n\nopt.zero_grad()\n\nforward(3).backward()\n\n{TAIL}", EVERY),
    *silence("past DDP, and reduced with the next", f"{WARM}\n\n{INNER}\n\ninexact(); forward(3).backward()\n\n{TAIL}",
             EVERY),
    *silence("past DDP, replicated", LOCAL["past DDP"][0], ("replicated", "compressed", "register")),
]  # fmt: skip


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_what_stands_in_grad_is_what_plain_ddp_uses(pool2, case, may_refuse):
    check(pool2, case, may_refuse)
