"""Whole scripts of training, each with one habit that no test of its own looks at: as with plain DDP, or refused."""

from __future__ import annotations

import re
from typing import Any

import compressing
import pytest
import torch
from machine.case import Case
from machine.compare import compare
from machine.play import Run
from machine.search import run
from more_scripts import MORE_SCRIPTS
from silence import BOTH, pieces
from workers import WorkerPool

import compress
import dear

ADAMW = ("AdamW", {"lr": 0.01})
MOMENTUM = ("SGD", {"lr": 0.05, "momentum": 0.9})
UNUSED = {"ddp": {"find_unused_parameters": True}}
MORE = ("compressed", "register", "owned")
NORMS = "note([(p.grad.norm() * 1000).round() for p in params])"

#: Pieces are separated by empty lines. With "refuse" among its options a script may end in one clear error, everywhere
#: or in these settings: DDP takes one hook for good.
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SWA with its own rates": (
        "attach(); swa = AveragedModel(net); s = torch.optim.swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=2)\n\n"
        "for k in range(5): train(k); s.step(); swa.update_parameters(net)\n\n"
        "note(list(swa.parameters()))\n\nnote([g['lr'] for g in opt.param_groups])",
        {"optimizer": MOMENTUM},
    ),
    "EMA of buffers, too": (
        "from torch.optim.swa_utils import get_ema_multi_avg_fn\n"
        "attach(); e = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)\n\n"
        "for k in range(4): train(k); e.update_parameters(net)\n\nnote(e.state_dict())",
        {"model": "Convolution", "optimizer": ADAMW},
    ),
    "rates set by a hook after the step": (
        "attach()\n\ndef halve(o, args, kwargs):\n    note(params[0].sum())\n"
        "    for g in o.param_groups: g['lr'] *= 0.5\n"
        "h = opt.register_step_post_hook(halve)\n\nfor k in range(3): train(k)\n\nh.remove()\n\ntrain(3)",
        {"optimizer": MOMENTUM},
    ),
    "a hook before the step sets the rate": (
        "attach()\n\ndef warm(o, args, kwargs):\n    for g in o.param_groups: g['lr'] += 0.01\n"
        "h = opt.register_step_pre_hook(warm)\n\nfor k in range(4): train(k)",
        {},
    ),
    "closures": (
        "attach()\n\nfor k in range(4):\n    def closure():\n        opt.zero_grad(); l = forward(k); l.backward()\n"
        "        return l\n    note(opt.step(closure))",
        {"optimizer": ADAMW},
    ),
    "torch.func between the steps": (
        "attach()\n\nfor k in range(4):\n    train(k)\n"
        "    w = dict(net.named_parameters())\n"
        "    f = lambda w: F.mse_loss(functional_call(net, w, (x(9),)), y(9))\n"
        "    note(torch.func.grad(f)(w)); note(torch.func.jvp(f, (w,), (w,)))",
        {},
    ),
    "rates between backward, step and forward": (
        "attach()\n\nfor k in range(4):\n    forward(k).backward()\n    opt.param_groups[0]['lr'] = 0.01 * (k + 1)\n"
        "    opt.step(); opt.param_groups[0]['lr'] = 5.0; opt.param_groups[0]['weight_decay'] = 0.1 * k\n"
        "    opt.zero_grad()",
        {"optimizer": MOMENTUM},
    ),
    "no rate for a while": (
        "attach()\n\nfor k in range(5):\n    opt.param_groups[0]['lr'] = 0.0 if k in (1, 2) else 0.05\n    train(k)",
        {"optimizer": MOMENTUM},
    ),
    "a weight of two parameters": (
        "attach()\n\nfor k in range(3): train(k); note(net.first.weight); note(net.last.weight)\n\n"
        "with torch.no_grad(): net.first.parametrizations.weight.original1.mul_(0.5)\n\ntrain(3)\n\n"
        "train(4)",
        {"model": "Normed"},
    ),
    "a weight that becomes two": (
        "attach()\n\nfor k in range(2): train(k)\n\nnn.utils.parametrizations.weight_norm(net.second)\n\n"
        "for k in range(2): train(k)",
        {"model": "Aliased", "refuse": True, **UNUSED},
    ),
    "module hooks of backward": (
        "attach()\n\nh = net.last.register_full_backward_hook(lambda m, gi, go: tuple(g * 0.5 for g in gi))\n\n"
        "p = net.first.register_full_backward_pre_hook(lambda m, go: tuple(g * 2 for g in go))\n\n"
        "for k in range(3): train(k)\n\nh.remove(); p.remove()\n\ntrain(3)",
        {},
    ),
    "values of rank 0, copied": (
        "attach()\n\nfor k in range(4):\n    train(k)\n    with torch.no_grad():\n        for p in params:\n"
        "            t = p.clone() if rank == 0 else torch.empty_like(p); dist.broadcast(t, 0); p.copy_(t * 0.99)",
        {"optimizer": ADAMW},
    ),
    "a scaler that skips": (
        "attach(); s = torch.amp.GradScaler('cpu', init_scale=4.0, growth_interval=2)\n\nfor k in range(6):\n"
        "    s.scale(forward(k) * (float('inf') if k in (2, 3) and rank == 1 else 1.0)).backward()\n"
        "    s.step(opt); s.update(); opt.zero_grad(); note(s.get_scale())",
        {"optimizer": ADAMW, "refuse": True},
    ),
    "two models at once": (
        "import dear; torch.manual_seed(3)\n"
        "other = type(model)(nn.Sequential(nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 8)))\n"
        "o2 = torch.optim.Adam(other.parameters(), 0.01); attach()\n"
        "e2 = None if run.plain else dear.attach(other, o2, bucket_cap_mb=0.001)\n\n"
        "for k in range(4):\n    a, b = forward(k), F.mse_loss(other(x(k)), y(k)); b.backward(); a.backward()\n"
        "    opt.step(); o2.step(); o2.zero_grad(); opt.zero_grad()\n\nnote(list(other.parameters()))\n\n"
        "if e2: e2.detach()",
        {},
    ),
    "attached by turns": (
        "attach()\n\nfor k in range(2): train(k)\n\ndetach()\n\nfor k in range(2): train(k)\n\n"
        "attach('replicated')\n\nfor k in range(2): train(k)\n\ndetach(); attach()\n\nfor k in range(2): train(k)",
        {"optimizer": ADAMW, "refuse": ("register",)},
    ),
    "a world of one": (
        "import dear; g = [dist.new_group([r]) for r in range(2)][rank]\n"
        "other = type(model)(copy.deepcopy(net), process_group=g)\n"
        "o2 = torch.optim.Adam(other.parameters(), 0.01); attach()\n"
        "e2 = None if run.plain else dear.attach(other, o2)\n\n"
        "for k in range(3): train(k); F.mse_loss(other(x(k)), y(k)).backward(); o2.step(); o2.zero_grad()\n\n"
        "note(list(other.parameters()))\n\nif e2: e2.detach()",
        {},
    ),
    "to another type and back": (
        "attach()\n\nfor k in range(2): train(k)\n\nnet.bfloat16(); net.float()\n\nfor k in range(2): train(k)",
        {"optimizer": MOMENTUM, "refuse": True},
    ),
    "weights that are tied later": (
        "attach()\n\nfor k in range(2): train(k)\n\nnet.second.weight = net.first.weight\n\n"
        "for k in range(3): train(k)",
        {"model": "Aliased", "refuse": True, **UNUSED},
    ),
    "seeds of every step": (
        "attach()\n\nfor k in range(4): torch.manual_seed(k); train(k); note(torch.rand(2))",
        {"model": "Noisy"},
    ),
    "statistics of a batch": (
        "attach()\n\nfor k in range(3):\n    train(k); note([b for _, b in sorted(net.named_buffers())])\n"
        "    model.eval(); note(model(x(9)).sum()); model.train()",
        {"model": "Convolution"},
    ),
    "join": (
        "attach()\n\ntrain(0)\n\nwith model.join():\n    for k in range(3): train(k)",
        {"refuse": True},
    ),
    "accumulated now and then": (
        "attach()\n\nfor k in range(6):\n    with contextlib.nullcontext() if k % 3 != 1 else model.no_sync():\n"
        "        forward(k).backward()\n    if k % 3 != 1: opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "anomalies are looked for": (
        "attach()\n\nwith torch.autograd.set_detect_anomaly(True):\n    for k in range(3): train(k)",
        {},
    ),
    "norms without a change": (
        "attach()\n\nfor k in range(4):\n    forward(k).backward()\n"
        f"    {NORMS}\n    {NORMS}\n    opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "norms, a change in every second step": (
        "attach(); inexact()\n\nfor k in range(5):\n    forward(k).backward()\n"
        f"    if k % 2: torch._foreach_mul_([p.grad for p in params], 0.5)\n    {NORMS}\n"
        "    opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "the total norm by itself": (
        "attach(); inexact()\n\nfor k in range(4):\n    forward(k).backward()\n"
        "    n = nn.utils.get_total_norm([p.grad for p in params]); note((n * 1000).round())\n"
        "    nn.utils.clip_grads_with_norm_(params, 0.05, n); opt.step(); opt.zero_grad()",
        {},
    ),
    "steps that are left out": (
        "attach()\n\nfor k in range(6):\n    forward(k).backward()\n    if k % 2: opt.step()\n    opt.zero_grad()",
        {"optimizer": MOMENTUM},
    ),
    "detached between backward and step": (
        "attach()\n\ntrain(0)\n\nforward(1).backward(); detach(); opt.step(); opt.zero_grad()\n\n"
        "train(2)\n\nattach()\n\ntrain(3)",
        {"optimizer": ADAMW, "refuse": ("register",)},
    ),
    "a teacher of some steps before": (
        "attach()\n\nfor k in range(4):\n    train(k); t = copy.deepcopy(net).eval()\n"
        "    for q in t.parameters(): q.requires_grad_(False)\n"
        "    (forward(k) + F.mse_loss(net(x(8)), t(x(8)) * 0.9)).backward(); opt.step(); opt.zero_grad()",
        {"refuse": True},
    ),
    "the optimizer's list turned round": (
        "attach()\n\nfor k in range(2): train(k)\n\nopt.param_groups[0]['params'].reverse()\n\n"
        "for k in range(3): train(k)",
        {"optimizer": ADAMW},
    ),
    "a group that comes later": (
        "attach()\n\nfor k in range(2): train(k)\n\nopt.add_param_group({'params': params[-1:], 'lr': 0.02})\n\n"
        "for k in range(3): train(k)",
        {"optimizer": ADAMW, "groups": 0},
    ),
    "saved between backward and step": (
        "attach()\n\ntrain(0)\n\nforward(1).backward()\n\ns = copy.deepcopy((net.state_dict(), optimizer_state()))\n\n"
        "opt.step(); opt.zero_grad()\n\ntrain(2)\n\nnet.load_state_dict(s[0]); load_optimizer(s[1])\n\ntrain(3)",
        {"optimizer": ADAMW},
    ),
    "two losses, one call": (
        "attach()\n\nfor k in range(3):\n    o = model(x(k))\n"
        "    torch.autograd.backward([o.square().mean(), o.abs().mean()])\n    opt.step(); opt.zero_grad()",
        {},
    ),
    "a part of the model by itself": (
        "attach()\n\nfor k in range(4):\n    train(k)\n    a = net.first(x(7)).sum(); note(a)\n"
        "    note(torch.autograd.grad(a, net.first.weight))",
        {},
    ),
}  # fmt: skip


def case(how: str, program: str, options: dict[str, Any]) -> Case:
    return Case(how, program=pieces(program), **{key: value for key, value in options.items() if key != "refuse"})


def trained_alike(pool: WorkerPool, how: str, scripts: dict[str, tuple[str, dict[str, Any]]]) -> None:
    outcomes = run(pool, [case(how, *script) for script in scripts.values()])

    def may_refuse(options: dict[str, Any]) -> bool:
        settings = options.get("refuse", ())
        return settings is True or how in settings

    wrong = {
        name: f"{outcome.kind} at {outcome.at!r}: {outcome.text}"
        for (name, (_, options)), outcome in zip(scripts.items(), outcomes, strict=True)
        if outcome.kind != "equal" and not (outcome.kind == "refused" and may_refuse(options))
    }
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


@pytest.mark.parametrize("how", [*BOTH, *(pytest.param(how, marks=pytest.mark.slow) for how in MORE)])
def test_scripts_train_the_same(pool2, how):
    trained_alike(pool2, how, SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("how", [*BOTH, *MORE])
def test_more_scripts_train_the_same(pool2, how):
    trained_alike(pool2, how, MORE_SCRIPTS)


class UnderCompression(Run):
    """A script under a compressor: with plain DDP as its hook, with the library under its schedule."""

    def __init__(self, case: Case, rank: int, plain: bool) -> None:
        super().__init__(case, rank, plain)
        self.compressor: Any = None

    def attach(self, update: str | None = None) -> None:
        # The first step of a plain hook goes out in DDP's first buckets, which under the schedule are none.
        made = KINDS[self.case.how](min_compression_ratio=0.2, start_step=1)
        if not self.plain:
            self.engine = dear.attach(self.model, self.opt, compressor=made, bucket_cap_mb=CAP, **self.case.attach)
        elif self.compressor is None:
            self.compressor = made
            compress.register(self.model, made)

    def _finish(self) -> None:
        self.note_all(self.optimizer_state()["state"])


CAP = 0.02  # MiB: several buckets
KINDS = {**compressing.KINDS, "int8": lambda **options: compress.Dense(torch.int8, **options)}


def under_compression(rank: int, world: int, cases: dict[str, tuple[Case, bool]]) -> list[str]:
    wrong = []
    for name, (script, may_refuse) in cases.items():
        plain = UnderCompression(script, rank, plain=True)
        refused = plain.play(len(script.program))
        if refused is not None:
            assert may_refuse, (name, refused)
            continue
        have = UnderCompression(script, rank, plain=False)
        raised = have.play(len(script.program))
        found = compare(have.notes, plain.notes, None if raised else len(script.program))
        if found or (raised is not None and not may_refuse):
            wrong.append(f"{name}: {found or raised}")
        if have.engine is not None:
            have.engine.__exit__(type(raised), raised, None) if raised else have.engine.detach()
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["acp", "power", "topk", "sign", "int8"])
def test_compressed_scripts_train_as_under_the_plain_hook(pool2, kind):
    cases = {}
    for name, (program, options) in (SCRIPTS | MORE_SCRIPTS).items():
        options = {**options, "ddp": {"bucket_cap_mb": CAP, **options.get("ddp", {})}}
        # A detached model has no compressor, where the hook stays; a compiled step rounds otherwise; a compressor
        # refuses gradients that are not finite.
        if not re.search(r"detach\(|may_round|join|float\('inf'\)", program):
            cases[name] = case(kind, program, options), "refuse" in options
    told = pool2.run(under_compression, cases)
    assert not any(told), "\n".join(told[0] or told[1])
