"""More scripts with habits that no test of its own looks at: what an optimizer, its options and gradients may do later.

Written after what users of DDP, FSDP and ZeRO report. As in test_silence_scripts.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from machine.search import run
from test_silence_scripts import ADAMW, MOMENTUM, UNUSED, case

FUSED = ("AdamW", {"lr": 0.01, "fused": True})
FUSED_SGD = ("SGD", {"lr": 0.05, "momentum": 0.9, "fused": True})
NESTEROV = ("SGD", {"lr": 0.05, "momentum": 0.9, "foreach": True})
IN_SHARDS = {"refuse": ("sharded", "owned")}
SCALED = (
    "attach(); s = torch.amp.GradScaler('cpu', init_scale=4.0, growth_interval=2)\n\nfor k in range(5):\n"
    "    s.scale(forward(k)).backward(); {}s.step(opt); s.update(); opt.zero_grad()"
)
# A module of the program's own, attached as the case says.
OWN = (
    "import dear\n"
    "how = {{'compressed': 'replicated', 'register': 'replicated'}}.get(run.case.how, run.case.how)\n"
    "torch.manual_seed(3); kind = type(opt)\n"
    "{}\nother = type(model)(small, **{}); o2 = kind(other.parameters(), **run.case.optimizer[1])\n"
    "e2 = None if run.plain else dear.attach(other, o2, update=how, bucket_cap_mb=0.001)\n\n"
    "for k in range(4):\n    l = F.mse_loss(other(x(k)), y(k)); note(l); l.backward(); o2.step(); o2.zero_grad()\n\n"
    "note(list(other.parameters()))\n\nif e2: e2.detach()"
)
EXPERTS = (
    "class Experts(nn.Module):\n    def __init__(self):\n        super().__init__(); self.calls = 0\n"
    "        self.each = nn.ModuleList(nn.Linear(16, 8) for _ in range(4))\n"
    "    def forward(self, x):\n        self.calls += 1; return self.each[(self.calls + rank) % 4](x)\n"
    "small = Experts()"
)
EMPTY = (
    "small = nn.Linear(16, 8); small.extra = nn.Parameter(torch.empty(0))\n"
    "small.more = nn.Parameter(torch.tensor(1.0))\n"
    "small.register_forward_hook(lambda m, a, o: o * m.more + m.extra.sum())"
)
ORTHOGONAL = "small = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, 8))"

#: Each has shown something else than plain DDP once.
FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "a fused optimizer": ("attach()\n\nfor k in range(6): train(k)", {"optimizer": FUSED}),
    "fused, with momentum": ("attach()\n\nfor k in range(6): train(k)", {"optimizer": FUSED_SGD, "groups": 2}),
    "fused, scaled": (SCALED.format(""), {"optimizer": FUSED}),
    "fused, scaled and unscaled": (SCALED.format("s.unscale_(opt); "), {"optimizer": FUSED_SGD}),
    "fused, scaled later and kept": (
        "attach(); s = torch.amp.GradScaler('cpu', init_scale=4.0)\n\nfor k in range(3): train(k)\n\n"
        "s.scale(forward(7)).backward(); s.step(opt); s.update(); inexact()\n\n"
        "forward(8).backward(); opt.step(); opt.zero_grad()",
        {"optimizer": FUSED, "groups": 2, **IN_SHARDS},
    ),
    "a scale for one step": (
        "attach()\n\nfor k in range(5):\n    (forward(k) * 2).backward(); opt.grad_scale = torch.tensor(2.0)\n"
        "    opt.step(); del opt.grad_scale; opt.zero_grad()",
        {"optimizer": FUSED},
    ),
    "fused later": (
        "attach()\n\nfor k in range(3): train(k)\n\n"
        "for g in opt.param_groups: g['fused'], g['foreach'] = True, False\n\n"
        "for k in range(3): train(k)",
        {"optimizer": ADAMW, **IN_SHARDS},
    ),
    "betas that are tensors": (
        "attach()\n\nfor k in range(4):\n    train(k)\n    for b in opt.param_groups[0]['betas']: b.mul_(0.9)",
        {"optimizer": ("Adam", {"lr": 0.01, "betas": (torch.tensor([0.9]), torch.tensor([0.99]))})},
    ),
    "gradients that change places": (
        "attach()\n\nfor k in range(4):\n    forward(k).backward(); a, b = net.first.weight, net.second.weight\n"
        "    a.grad, b.grad = b.grad, a.grad; opt.step(); opt.zero_grad()",
        {"model": "Aliased", "optimizer": ADAMW, **IN_SHARDS},
    ),
    "gradients of the last step": (
        "attach(); last = None\n\nfor k in range(5):\n    forward(k).backward(); g = [p.grad for p in params]\n"
        "    if last: note(last); note([(a * b).sum() for a, b in zip(last, g)])\n"
        "    last = g; opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW, **IN_SHARDS},
    ),
    "gradients of the last step, read before": (
        "attach(); last = None\n\nfor k in range(5):\n    forward(k).backward(); note(params[0].grad.sum())\n"
        "    g = [p.grad for p in params]; opt.step(); opt.zero_grad()\n    if last: note(last)\n    last = g",
        {"optimizer": ADAMW, **IN_SHARDS},
    ),
    "gradients put back": (
        "attach()\n\nfor k in range(3):\n    forward(k).backward(); g = [p.grad for p in params]; opt.step()\n"
        "    opt.zero_grad(); forward(k + 20).backward()\n    for p, each in zip(params, g): p.grad = each\n"
        "    opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW, **IN_SHARDS},
    ),
    "norms of the last gradients": (
        "attach(); last = None\n\nfor k in range(4):\n    forward(k).backward(); g = [p.grad for p in params]\n"
        "    if last: note([(each.norm() * 1000).round() for each in last])\n"
        "    last = g; opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW, **IN_SHARDS},
    ),
}

#: These never have.
KEPT: dict[str, tuple[str, dict[str, Any]]] = {
    "gradients held and never read": (
        "attach()\n\n"
        "for k in range(5): forward(k).backward(); g = [p.grad for p in params]; opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "gradients held, parameters unused": (
        "attach()\n\n"
        "for k in range(6): forward(k).backward(); g = [p.grad for p in params]; opt.step(); opt.zero_grad()",
        {"model": "Unused", "optimizer": ADAMW, **UNUSED},
    ),
    "rates that are tensors": (
        "attach()\n\nfor k in range(4): train(k); opt.param_groups[0]['lr'].mul_(0.5)",
        {"optimizer": ("SGD", {"lr": torch.tensor(0.05)})},
    ),
    "nesterov for one group, later": (
        "attach()\n\nfor k in range(5):\n    forward(k).backward()\n"
        "    opt.param_groups[-1]['nesterov'] = k > 2; opt.step()\n"
        "    note((params[0].grad.norm() * 1000).round()); opt.zero_grad()",
        {"optimizer": NESTEROV, "groups": 2},
    ),
    "switches of an optimizer, one by one": (
        "attach()\n\nfor k, (n, v) in enumerate([('momentum', 0.9), ('weight_decay', 0.1), ('maximize', True),\n"
        "        ('foreach', True), ('nesterov', True), ('momentum', 0.5), ('nesterov', False), ('foreach', False)]):\n"
        "    opt.param_groups[0][n] = v; train(k)",
        {"optimizer": ("SGD", {"lr": 0.05}), "groups": 2},
    ),
    "groups that change places": (
        "attach()\n\nfor k in range(2): train(k)\n\nopt.param_groups.reverse()\n\nfor k in range(2): train(k)\n\n"
        "opt.param_groups[0], opt.param_groups[1] = dict(opt.param_groups[1]), dict(opt.param_groups[0])\n\n"
        "for k in range(2): train(k)",
        {"optimizer": ADAMW, "groups": 2},
    ),
    "a group for each parameter, later": (
        "attach()\n\nfor k in range(2): train(k)\n\ng = opt.param_groups[0]\n"
        "opt.param_groups[:] = [{**g, 'params': [p], 'lr': 0.001 * (i + 1)} for i, p in enumerate(g['params'])]\n\n"
        "for k in range(3): train(k)",
        {"optimizer": ADAMW},
    ),
    "a gradient penalty": (
        "attach()\n\nfor k in range(4):\n    i = x(k).requires_grad_(); o = model(i)\n"
        "    g, = torch.autograd.grad(o.square().sum(), i, create_graph=True)\n"
        "    l = F.mse_loss(o, y(k)) + g.square().mean(); note(l); l.backward(); opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "hooks that change gradients": (
        "attach()\n\nh = params[0].register_hook(lambda g: g * 0.5)\n\nfor k in range(3): train(k)\n\nh.remove()\n\n"
        "train(3)",
        {"optimizer": ADAMW},
    ),
    "orthogonal weights": (OWN.format(ORTHOGONAL, "{}"), {"optimizer": ADAMW}),
    "no elements, and no dimensions": (OWN.format(EMPTY, "{}"), {"optimizer": ADAMW}),
    "an expert for each rank": (OWN.format(EXPERTS, "{'find_unused_parameters': True}"), {"optimizer": ADAMW}),
    "Ctrl-C around a step": (
        "attach()\n\nfor k in range(2): train(k)\n\ndef stop(*a): raise KeyboardInterrupt\n"
        "h = opt.register_step_pre_hook(stop)\nforward(2).backward()\ntry: opt.step()\n"
        "except KeyboardInterrupt: pass\nh.remove(); opt.step(); opt.zero_grad()\n\ntrain(3)",
        {"optimizer": ADAMW},
    ),
    "parameters in one tensor of the user's": (
        "attach()\n\nfor k in range(2): train(k)\n\nflat = parameters_to_vector(params).detach().clone(); at = 0\n"
        "for p in params: p.data = flat[at:at + p.numel()].view_as(p); at += p.numel()\n\n"
        "for k in range(3): train(k); note(flat.sum())",
        {"optimizer": ADAMW, "refuse": True},
    ),
    "shared memory": (
        "attach()\n\ntrain(0)\n\nnet.share_memory()\n\nfor k in range(2): train(k)",
        {"optimizer": ADAMW},
    ),
    "gradients without backward()": (
        "attach()\n\ntrain(0)\n\nfor k in range(3):\n    gs = torch.autograd.grad(net(x(k)).square().mean(), params)\n"
        "    for p, g in zip(params, gs): dist.all_reduce(g); p.grad = g / 2\n    opt.step(); opt.zero_grad()\n\n"
        "train(5)",
        {"optimizer": ADAMW},
    ),
    "clipped by groups": (
        "attach(); inexact()\n\nfor k in range(4):\n    forward(k).backward()\n"
        "    for i, g in enumerate(opt.param_groups):\n"
        "        note((nn.utils.clip_grad_norm_(g['params'], 0.1 * (i + 1)) * 1000).round())\n"
        "    opt.step(); opt.zero_grad()",
        {"groups": 2, "optimizer": MOMENTUM},
    ),
    "the class's step": (
        "attach()\n\ntrain(0)\n\nfor k in range(3): forward(k).backward(); type(opt).step(opt); opt.zero_grad()\n\n"
        "train(9)",
        {"optimizer": MOMENTUM, **IN_SHARDS},
    ),
    "a step on another thread": (
        "attach()\n\nfor k in range(3):\n    forward(k).backward()\n"
        "    with ThreadPoolExecutor(1) as pool: pool.submit(opt.step).result()\n    opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "a rate finder": (
        "attach()\n\ntrain(0)\n\nsd, so = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer_state())\n\n"
        "for k in range(3): opt.param_groups[0]['lr'] *= 2; train(k)\n\nnet.load_state_dict(sd); load_optimizer(so)\n\n"
        "for k in range(2): train(k)",
        {"optimizer": ADAMW},
    ),
}  # fmt: skip


def check(pool: Any, scripts: dict[str, tuple[str, dict[str, Any]]], how: str) -> None:
    """Fails with the names of those that end otherwise than they may."""
    outcomes = run(pool, [case(how, *script) for script in scripts.values()])
    wrong = []
    for (name, (_, options)), outcome in zip(scripts.items(), outcomes, strict=True):
        settings = options.get("refuse", ())
        may_refuse = settings is True or how in settings
        if outcome.kind != "equal" and not (outcome.kind == "refused" and may_refuse):
            wrong.append(f"{name}: {outcome.kind} at {outcome.at!r}: {outcome.text}")
    assert not wrong, "\n".join(wrong)


MORE = [pytest.param(how, marks=pytest.mark.slow) for how in ("owned", "compressed", "register")]


@pytest.mark.parametrize("how", ["sharded", "replicated", *MORE])
def test_what_was_found_is_as_in_plain_ddp(pool2, how):
    check(pool2, FOUND, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sharded", "replicated", "owned", "compressed", "register"])
def test_the_others_are_as_in_plain_ddp(pool2, how):
    check(pool2, KEPT, how)
