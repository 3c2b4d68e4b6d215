"""The optimizer's own state and hyper-parameters, read, copied, changed or wrapped, as under plain DDP."""

import pytest
import torch
import training
from silence import BOTH, EVERY, IN_SHARDS, WARM, check, check_told, silence, told

import dear

TAIL = "\n\nopt.zero_grad()\n\nfor step in range(4, 7): train(step)"
ADAM = {"optimizer": ("AdamW", {"lr": 0.01})}
MOMENTUM = {"optimizer": ("SGD", {"lr": 0.05, "momentum": 0.9})}
STEP = "forward(3).backward(); opt.step()"
STATES = {
    "copied": "note(copy.deepcopy(opt).state_dict()['state'])",
    "copied shallowly": "note(copy.copy(opt).state_dict()['state'])",
    "pickled": "note(pickle.loads(pickle.dumps(opt)).state_dict()['state'])",
    "saved": "file = io.BytesIO(); torch.save(opt, file); file.seek(0)\n"
    "note(torch.load(file, weights_only=False).state_dict()['state'])",
    "saved by state_dict": "note(opt.state_dict()['state'])",
    "saved by the engine": "note(optimizer_state()['state'])",
    "read by parameter": "note([sorted(opt.state[p].items()) for p in params])",
    "read by get": "note([sorted(opt.state.get(p, {}).items()) for p in params])",
    "listed": "note([sorted(state.items()) for state in opt.state.values()])",
    "counted": "note(len(opt.state))",
    "asked for": "note([p in opt.state for p in params])",
    "cleared": "opt.state.clear()",
    "one cleared": "del opt.state[params[0]]",
    "replaced": "opt.state = type(opt.state)(dict)",
    "written": "for p in params: opt.state[p]['exp_avg'].zero_()",
    "written by key": "for p in params: opt.state[p]['exp_avg'] = torch.zeros_like(p)",
    "read by a kept dict": "note([sorted(state.items()) for state in kept])",
    "written by a kept dict": "for state in kept: state['exp_avg'].zero_()",
    "loaded": "opt.load_state_dict(saved)",
    "loaded by the engine": "load_optimizer(copy.deepcopy(saved))",
    "loaded into another": "other = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in params], lr=0.01)\n"
    "other.load_state_dict(optimizer_state()); note(other.state_dict()['state'])",
    "set": "opt.__setstate__(opt.__getstate__())",
    "in a fork": "note(in_a_fork(lambda: [float(opt.state[p]['step']) for p in params]))",
}
HYPER = {
    "rate": "opt.param_groups[0]['lr'] = 0.001",
    "rate in place": "opt.param_groups[0]['lr'].mul_(0.1)",
    "decay": "opt.param_groups[0]['weight_decay'] = 0.5",
    "betas": "opt.param_groups[0]['betas'] = (0.5, 0.5)",
    "sign": "opt.param_groups[0]['maximize'] = True",
    "a new list": "opt.param_groups = [{**opt.param_groups[0], 'lr': 0.001}]",
    "updated": "opt.param_groups[0].update(lr=0.001, weight_decay=0.3)",
    "defaults": "opt.defaults['lr'] = 7.0",
    "a schedule": "s = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1); s.step()",
    "restarted": "s = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 2); s.step()",
    "a cycle with momentum": "s = torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=20); s.step()",
    "a plateau": "s = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.1)\n"
    "s.step(1.0); s.step(2.0); s.step(3.0)",
}
LOOKAHEAD = """
class Lookahead:
    def __init__(self, inner): self.inner, self.slow = inner, [p.detach().clone() for p in params]
    def step(self):
        self.inner.step()
        for s, p in zip(self.slow, params):
            s.add_(p.detach() - s, alpha=0.5)
            p.data.copy_(s)

look = Lookahead(opt)

for step in range(5): forward(step).backward(); look.step(); opt.zero_grad()
"""
SCALED = """
scaler = torch.amp.GradScaler('cpu', init_scale=256.0)

for step in range(5):
    scaler.scale(forward(step)).backward()
    scaler.step(opt); scaler.update(); opt.zero_grad()

note(scaler.get_scale())
"""
CASES = [
    *[
        test
        for name, code in STATES.items()
        for test in silence(f"state {name}", "attach()\n\nfor step in range(3): train(step)\n\nsaved = copy.deepcopy("
                            "optimizer_state()); kept = [opt.state[p] for p in params if p in opt.state]\n\nahead(3)"
                            f"\n\n{code}{TAIL}", BOTH, IN_SHARDS, **ADAM)
    ],
    *[
        test
        for name, code in HYPER.items()
        for test in silence(f"hyper-parameters, {name}", f"{WARM}\n\nahead(3)\n\n{code}{TAIL}",
                            optimizer=("AdamW", {"lr": torch.tensor(0.01) if "in place" in name else 0.01}))
    ],
    *silence("a schedule made before", "s = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)\n\nattach()\n\n"
             "for step in range(5): train(step); s.step()", EVERY, **MOMENTUM),
    *silence("a schedule made after", "attach()\n\ns = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)\n\n"
             "for step in range(5): train(step); s.step()", EVERY, **MOMENTUM),
    *silence("an optimizer around it", f"attach()\n{LOOKAHEAD}", EVERY, **MOMENTUM),
    *silence("an optimizer around it made before", f"{LOOKAHEAD.split('for step')[0]}\nattach()\n\n"
             "for step in range(5): forward(step).backward(); look.step(); opt.zero_grad()", EVERY, **MOMENTUM),
    *silence("a scaler", f"attach()\n{SCALED}", EVERY, True, **MOMENTUM),
    *silence("a hook after the step", "seen = []\n\nopt.register_step_post_hook(lambda o, a, k: seen.append("
             f"[p.detach().clone() for p in params]))\n\n{WARM}\n\n{STEP}\n\nnote(seen){TAIL}", EVERY, **ADAM),
    *silence("a hook after the step, added later", f"{WARM}\n\nseen = []\n\nopt.register_step_post_hook("
             "lambda o, a, k: seen.append([p.detach().clone() for p in params]))\n\n"
             f"{STEP}\n\nnote(seen){TAIL}", **ADAM),
    *silence("a hook before the step", "opt.register_step_pre_hook(lambda o, a, k: o.param_groups[0].update("
             f"lr=o.param_groups[0]['lr'] * 0.9))\n\n{WARM}{TAIL}", EVERY, **ADAM),
    *silence("a hook before the step that clips", f"{WARM}\n\nopt.register_step_pre_hook(lambda o, a, k: "
             f"nn.utils.clip_grad_value_(params, 0.01)){TAIL}", EVERY, True, **ADAM),
    *silence("a hook after the step that writes", "opt.register_step_post_hook(lambda o, a, k: "
             f"[p.data.clamp_(-0.1, 0.1) for p in params] and None)\n\n{WARM}{TAIL}", EVERY, **ADAM),
    *silence("a step of its class", f"{WARM}\n\nforward(3).backward()\n\ntype(opt).step(opt){TAIL}", EVERY, True,
             **ADAM),
    *silence("a step kept from before", f"kept = opt.step\n\n{WARM}\n\nforward(3).backward()\n\nkept(){TAIL}", EVERY,
             True, **ADAM),
    *silence("a step wrapped later", f"{WARM}\n\nplain = opt.step; opt.step = lambda *a: (note(params[0].sum()), "
             f"plain(*a))[1]{TAIL}", EVERY, **ADAM),
    *silence("a closure", "attach()\n\nfor step in range(4):\n    def closure():\n        opt.zero_grad()\n"
             "        loss = forward(step); loss.backward(); return loss\n    note(opt.step(closure))", EVERY, **ADAM),
    *silence("LBFGS", "attach()\n\nfor step in range(3):\n    def closure():\n        opt.zero_grad()\n"
             "        loss = forward(step); loss.backward(); return loss\n    note(opt.step(closure))",
             ("replicated", "compressed", "register"), optimizer=("LBFGS", {"lr": 0.1, "max_iter": 3})),
    *silence("a second optimizer", f"second = torch.optim.SGD(params[:2], 0.01)\n\n{WARM}\n\nforward(3).backward()\n\n"
             f"second.step(); opt.step(){TAIL}", EVERY, True, **ADAM),
    *silence("a second optimizer, pending", f"second = torch.optim.SGD(params[:2], 0.01)\n\n{WARM}\n\nahead(3)\n\n"
             f"second.step(){TAIL}", BOTH, True, **ADAM),
    *silence("saved and resumed in place", f"{WARM}\n\nahead(3)\n\nstate = copy.deepcopy((net.state_dict(), "
             f"optimizer_state()))\n\nopt.zero_grad()\n\ntrain(7); train(8)\n\nnet.load_state_dict(state[0]); "
             f"load_optimizer(state[1]){TAIL}", BOTH, **ADAM),
    *silence("resumed before the first step", "state = None\n\ntrain(0); train(1)\n\nstate = copy.deepcopy("
             f"(net.state_dict(), opt.state_dict()))\n\nattach()\n\nload_optimizer(state[1]){TAIL}", BOTH, **ADAM),
    *silence("cleared with state of what is frozen", "opt.state[params[2]]['momentum_buffer'] = torch.ones_like("
             f"params[2])\n\n{WARM}\n\nopt.state.clear(){TAIL}", BOTH, model="Frozen",
             optimizer=("SGD", {"lr": 0.05, "momentum": 0.9})),
    *silence("a hook of all optimizers that reads",
             "from torch.optim.optimizer import register_optimizer_step_pre_hook as register\n"
             "hook = register(lambda *_: note(params[0]))\n"
             f"other = nn.Parameter(torch.zeros(3)); second = torch.optim.SGD([other], lr=0.1)\n\n{WARM}\n\n"
             f"ahead(3)\n\nother.grad = torch.ones(3); second.step(); hook.remove(); opt.zero_grad(){TAIL}",
             BOTH, **ADAM),
]  # fmt: skip


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_the_optimizer_is_that_of_plain_ddp(pool2, case, may_refuse):
    check(pool2, case, may_refuse)


@told
def compiled(rank, world):
    """A step that was compiled is what updates every step, and not its class's."""
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph(*args)

        return run

    model, opt = training.build("Mlp", (torch.optim.AdamW, {"lr": 0.01}), {})
    opt.step = torch.compile(opt.step, backend=backend)
    engine = dear.attach(model, opt, update="replicated", **training.SMALL)
    for step in range(4):
        before = len(calls)
        training.plain_step(model, opt, rank, step)
        engine.synchronize()
        assert len(calls) > before, step
    engine.detach()


def test_a_compiled_step_is_used(pool2):
    check_told(pool2, compiled)
