"""Gradients on their way: read, written, kept or accumulated as in plain DDP, or one clear sentence."""

import pytest
import torch
import torch.distributed as dist
from silence import BOTH, EVERY, IN_SHARDS, WARM, check, check_told, silence, told
from torch import optim
from torch.nn.parallel import DistributedDataParallel as DDP

import dear

BACK = "attach()\n\nfor step in range(3): train(step)\n\nforward(3).backward()"
TAIL = "\n\nfor step in range(4, 7): train(step)"
STEP = "opt.step()\n\nopt.zero_grad()"
VIEW = {"ddp": {"gradient_as_bucket_view": True}}
LARGE = {"model": "Wide", "attach": {"bucket_cap_mb": 1}}
TWICE = """
attach()

for step in range(4):
    loss = forward(step)
    loss.backward(retain_graph=True)
    inexact()
    loss.backward()
    opt.step(); opt.zero_grad()
"""
# Gradients that stay are added to while they may still be on their way: one rank is held until the other waits.
NEVER = """
attach()

for step in range(3): forward(step).backward(); opt.step()

ahead(3)

for step in range(4, 7): forward(step).backward(); opt.step()
"""
USES = {
    "read": "note([p.grad.clone() for p in params])",
    "norm": "note(torch.nn.utils.get_total_norm([p.grad for p in params], float('inf')))",
    "numpy": "note(params[0].grad.numpy().tolist())",
    "scaled": "for p in params: p.grad.mul_(0.5)",
    "scaled by foreach": "torch._foreach_mul_([p.grad for p in params], 0.5)",
    "clipped by value": "nn.utils.clip_grad_value_(params, 0.01)",
    "clipped by norm": "note(nn.utils.clip_grad_norm_(params, 0.01, float('inf')))",
    "replaced": "for p in params: p.grad = torch.full_like(p, 0.01)",
    "one dropped": "params[0].grad = None",
    "one replaced": "params[0].grad = torch.zeros_like(params[0])",
    "one zeroed": "params[0].grad.zero_()",
    "written by .data": "params[0].grad.data.zero_()",
    "written by numpy": "params[0].grad.detach().numpy()[...] = 0",
    "noise added": "torch.manual_seed(3)\nfor p in params: p.grad.add_(torch.randn(p.shape) * 0.01)",
    "sign": "for p in params: p.grad = p.grad.sign()",
    "centralized": "with torch.no_grad(): [p.grad.sub_(p.grad.mean(0, keepdim=True)) for p in params]",
    "reduced again": "for p in params: dist.all_reduce(p.grad); p.grad.div_(2)",
    "other memory by .data": "params[0].grad.data = torch.ones_like(params[0])",
    "other memory by set_": "params[0].grad.set_(torch.ones_like(params[0]))",
    "as its class": "note([p.grad.as_subclass(torch.Tensor).clone() for p in params])",
    "shapes only": "note([(p.grad.shape, p.grad.dtype, p.grad.is_contiguous()) for p in params])",
}
# Of these uses, those that train right in shards, too.
SERVED = {
    "norm", "scaled", "scaled by foreach", "clipped by value", "clipped by norm", "replaced", "one replaced"
}  # fmt: skip
NESTEROV = {"optimizer": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "foreach": True})}
CASES = [
    *[
        test
        for name, code in USES.items()
        for test in silence(f"gradient {name}", f"{BACK}\n\n{code}\n\n{STEP}{TAIL}", EVERY,
                            name not in SERVED and IN_SHARDS)
    ],
    *silence("gradient divided by nothing", f"{BACK}\n\nparams[0].grad.div_(0.0)\n\n{STEP}{TAIL}"),
    *silence("clipped by the engine", f"{BACK}\n\nclip(0.01, float('inf'))\n\n{STEP}{TAIL}", EVERY),
    *silence("clipped, then zeroed in place", f"{BACK}\n\nclip(0.01, float('inf'))\n\nopt.step()\n\n"
             f"opt.zero_grad(set_to_none=False){TAIL}", EVERY),
    *silence("zeroed in place", f"{WARM}\n\nahead(3)\n\nopt.zero_grad(set_to_none=False){TAIL}"),
    *silence("zeroed in place one by one", f"{WARM}\n\nahead(3)\n\nfor p in params: p.grad.zero_(){TAIL}", BOTH, True),
    *silence("zeroed in place by foreach", f"{WARM}\n\nahead(3)\n\ntorch._foreach_zero_("
             f"[p.grad for p in params]){TAIL}", BOTH, True),
    *silence("kept gradients", f"{BACK}\n\ngrads = [p.grad for p in params]\n\n{STEP}\n\nnote(grads){TAIL}", EVERY,
             True),
    *silence("kept gradients, pending", f"{WARM}\n\nahead(3)\n\ngrads = [p.grad for p in params]\n\nopt.zero_grad()\n\n"
             f"note(grads){TAIL}", BOTH, True),
    *silence("kept gradients written after the step", f"{BACK}\n\ngrads = [p.grad for p in params]\n\n{STEP}\n\n"
             f"for g in grads: g.zero_(){TAIL}", EVERY, True),
    *silence("read after the step", f"{WARM}\n\nahead(3)\n\nnote([p.grad.clone() for p in params])\n\nopt.zero_grad()"
             f"{TAIL}", BOTH, True),
    *silence("scaled after the step", f"{WARM}\n\nahead(3)\n\nfor p in params: p.grad.mul_(2)\n\nopt.zero_grad()"
             f"{TAIL}", BOTH, True),
    *silence("used twice", f"{BACK}\n\nopt.step()\n\nopt.step()\n\nopt.zero_grad(){TAIL}", EVERY, True),
    *silence("used twice, zeroed in place", f"{BACK}\n\nopt.step()\n\nopt.step()\n\n"
             f"opt.zero_grad(set_to_none=False){TAIL}", EVERY, True),
    *silence("changed in place by the step, kept", "attach()\n\nforward(0).backward()\n\nopt.step()\n\n"
             f"forward(1).backward()\n\nopt.step(){TAIL}", EVERY, True, **NESTEROV),
    *[
        test
        for name, code in {"before backward": "l = forward(s); opt.zero_grad(); l.backward()",
                           "in place": "l = forward(s); opt.zero_grad(set_to_none=False); l.backward()",
                           "before forward": "opt.zero_grad(); forward(s).backward()"}.items()
        for test in silence(f"changed in place by the step, zeroed {name}",
                            f"attach()\n\nfor s in range(5): {code}; opt.step()", EVERY, **NESTEROV)
    ],
    *silence("zeroed in place and used again", f"{BACK}\n\nopt.step()\n\nopt.zero_grad(set_to_none=False)\n\n"
             f"opt.step(){TAIL}", EVERY, True),
    *silence("zeroed first", f"{BACK}\n\nopt.zero_grad()\n\nopt.step(){TAIL}", EVERY),
    *silence("backward twice", TWICE, EVERY, True),
    *silence("backward twice, views", TWICE, EVERY, True, **VIEW),
    *silence("backward twice, later", f"{WARM}\n\nloss = forward(3)\nloss.backward(retain_graph=True)\ninexact()\n"
             f"loss.backward()\n\n{STEP}{TAIL}", EVERY, True),
    *silence("never zeroed", NEVER, EVERY),
    *silence("never zeroed, views", NEVER, EVERY, **VIEW),
    *silence("never zeroed, large", NEVER, EVERY, **LARGE),
    *silence("never zeroed, large, views", NEVER, EVERY, **LARGE, **VIEW),
    *silence("a step in three", f"{WARM}\n\nforward(3).backward(); forward(4).backward()\n\nforward(5).backward()\n\n"
             f"{STEP}{TAIL}", EVERY, True),
    *silence("a step in three without sync", f"{WARM}\n\nwith model.no_sync(): forward(3).backward()\n\n"
             f"with model.no_sync(): forward(4).backward()\n\nforward(5).backward()\n\n{STEP}{TAIL}", EVERY),
    *silence("a step in three without sync, views", f"{WARM}\n\nwith model.no_sync(): forward(3).backward()\n\n"
             f"with model.no_sync(): forward(4).backward()\n\nforward(5).backward()\n\n{STEP}{TAIL}", EVERY, **VIEW),
    *silence("no sync last", f"{WARM}\n\nforward(3).backward()\n\nwith model.no_sync(): forward(4).backward()\n\n"
             f"{STEP}{TAIL}", EVERY, True),
    *silence("no sync first of all", f"attach()\n\nwith model.no_sync(): forward(3).backward()\n\nforward(4).backward()"
             f"\n\n{STEP}{TAIL}", EVERY),
    *silence("no sync while pending", f"{WARM}\n\nahead(3)\n\nopt.zero_grad()\n\nwith model.no_sync(): "
             f"forward(4).backward()\n\nforward(5).backward()\n\n{STEP}{TAIL}"),
    *silence("no sync in place", f"{WARM}\n\nahead(3)\n\nopt.zero_grad(set_to_none=False)\n\nwith model.no_sync(): "
             f"forward(4).backward()\n\nforward(5).backward()\n\nopt.step(){TAIL}", BOTH, True),
    *silence("two losses", f"{WARM}\n\n(forward(3) + forward(4)).backward()\n\n{STEP}{TAIL}", EVERY, True),
    *silence("autograd.grad", f"{WARM}\n\nahead(3)\n\nopt.zero_grad()\n\nnote(torch.autograd.grad(net(x(9)).sum(), "
             f"params)){TAIL}"),
    *silence("gradient of the input", f"{WARM}\n\nahead(3)\n\nopt.zero_grad()\n\ni = x(9).requires_grad_()\n"
             f"note(torch.autograd.grad(net(i).sum(), i)){TAIL}"),
    *silence("gradient penalty", "attach()\n\nfor step in range(4):\n    i = x(step).requires_grad_()\n"
             "    g, = torch.autograd.grad(net(i).sum(), i, create_graph=True)\n"
             "    (forward(step) + g.square().mean()).backward()\n    opt.step(); opt.zero_grad()", EVERY, True),
    *silence("a hook on a parameter", f"params[0].register_hook(lambda g: g * 0.5)\n\n{WARM}{TAIL}", EVERY),
    *silence("a parameter that joins behind a clipping", "attach()\n\nforward(1).backward()\n\n"
             "clip(0.01, float('inf'))\n\nopt.add_param_group({'params': params[-1:]})\n\nforward(3).backward()\n\n"
             "opt.step()", EVERY, groups=0),
    *silence("a hook on a parameter, later", f"{WARM}\n\nparams[0].register_hook(lambda g: g * 0.5){TAIL}", EVERY),
    *silence("a hook after accumulation", f"{WARM}\n\nparams[0].register_post_accumulate_grad_hook("
             f"lambda p: note(p.sum())){TAIL}", EVERY),
    *silence("a step in the hook after accumulation", f"{WARM}\n\nahead(3)\n\nopt.zero_grad()\n\n"
             f"h = params[-1].register_post_accumulate_grad_hook(lambda p: note([q.sum() for q in params])){TAIL}"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_gradients_are_those_of_plain_ddp(pool2, case, may_refuse):
    check(pool2, case, may_refuse)


@told
def changed_by_updates_that_one_rank_does_not_see(rank, world, how):
    """Of the second group, one parameter, one rank owns nothing; its foreach update changes .grad in place."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 37), torch.nn.Linear(37, 8))
    *most, last = net.parameters()
    kind = optim.SGD if how == "sharded" else type("SGD", (optim.SGD,), {"dear_whole": True})
    groups = [{"params": most, "nesterov": False}, {"params": [last]}]
    opt = kind(groups, lr=0.05, momentum=0.9, nesterov=True, foreach=True)
    model = DDP(net)
    engine = dear.attach(model, opt, update=how, bucket_cap_mb=0.002)
    norm = lambda: torch.linalg.vector_norm(last.grad).item()  # noqa: E731
    for switched in (True, False, True):
        opt.param_groups[1]["nesterov"] = switched
        for _ in range(2):
            opt.zero_grad()
            model(torch.ones(4, 16)).square().mean().backward()
            before = norm()
            opt.step()
            assert (norm() != before) is switched, (switched, norm(), before)  # every rank asks, or none
    with pytest.raises(RuntimeError, match="was changed other than by a factor"):
        model(torch.ones(4, 16)).square().mean().backward()
    dist.barrier()
    engine.__exit__(KeyError, None, None)


@pytest.mark.parametrize("how", ["sharded", "owned"])
def test_an_update_that_changes_gradients_is_known_to_who_owns_none_of_them(pool2, how):
    check_told(pool2, changed_by_updates_that_one_rank_does_not_see, how)
