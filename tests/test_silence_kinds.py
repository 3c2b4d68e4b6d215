"""What scripts do with a model between steps that nobody planned for: as with plain DDP, or refused in one sentence."""

import pytest
from machine.case import Case
from machine.search import run
from more_kinds import MORE
from silence import BOTH, WARM, pieces

TAIL = "\n\nopt.zero_grad()\n\nfor step in range(4, 7): train(step)"
#: Done while parameters and gradients of a step are on their way; pieces are separated by empty lines.
KINDS = {
    "weakref": "import weakref; w = weakref.ref(params[0]); note(w().sum())",
    "copy net": "c = copy.copy(net); note(c(x(9)))",
    "copy model": "c = copy.copy(model); note(c(x(9)))",
    "no_grad decorator": "@torch.no_grad()\n"
    "def f(): params[0].add_(0.01)\n"
    "f()",
    "grad of inner": "note(torch.autograd.grad(F.mse_loss(net(x(9)), y(9)), params))",
    "swap_tensors": "import torch.utils; q = nn.Parameter(params[1].detach().clone()*2); "
    "torch.utils.swap_tensors(net.first.bias, q)",
    "share_memory": "net.share_memory()",
    "to cpu": "net.cpu(); net.to('cpu'); net.float()",
    "param hook": "h = params[0].register_hook(lambda g: g * 0.5)",
    "post accumulate hook": "h = params[0].register_post_accumulate_grad_hook(lambda p: note(p.grad.shape))",
    "post accumulate hook reads": "h = params[0].register_post_accumulate_grad_hook(lambda p: note(p.grad))",
    "two forwards one backward": "opt.zero_grad()\n"
    "\n"
    "(forward(30) + forward(31)).backward(); opt.step()",
    "backward inputs": "opt.zero_grad()\n"
    "\n"
    "forward(30).backward(inputs=params); opt.step()",
    "gradient penalty": "opt.zero_grad()\n"
    "\n"
    "xi = x(9).requires_grad_(); out = model(xi); "
    "(gi,) = torch.autograd.grad(out.sum(), xi, create_graph=True)\n"
    "(F.mse_loss(out, y(9)) + gi.square().mean()).backward(); opt.step()",
    "sync flag": "opt.zero_grad()\n"
    "\n"
    "model.require_backward_grad_sync = False; forward(30).backward(); "
    "model.require_backward_grad_sync = True; forward(31).backward(); opt.step()",
    "user's collectives": "t = x(9); dist.all_reduce(t); note(t); dist.barrier()",
    "post hook": "opt.register_step_post_hook(lambda *_: note(params[0]))",
    "pre hook": "opt.register_step_pre_hook(lambda *_: note(params[0]))",
    "class step": "opt.zero_grad()\n"
    "\n"
    "forward(30).backward(); type(opt).step(opt)",
    "ema multi": "from torch.optim.swa_utils import get_ema_multi_avg_fn; "
    "e = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)); e.update_parameters(net)\n"
    "\n"
    "train(30)\n"
    "\n"
    "e.update_parameters(net); note(list(e.parameters()))",
    "lr finder": "kept = copy.deepcopy((net.state_dict(), optimizer_state()))\n"
    "\n"
    "train(30)\n"
    "\n"
    "net.load_state_dict(kept[0]); load_optimizer(kept[1])",
    "clip torch": "opt.zero_grad()\n"
    "\n"
    "forward(30).backward(); nn.utils.clip_grad_norm_(net.parameters(), 0.1); opt.step()",
    "grad scaler": "s = torch.amp.GradScaler('cpu', init_scale=8.0)\n"
    "\n"
    "opt.zero_grad()\n"
    "\n"
    "for k in (30, 31): s.scale(forward(k)).backward(); s.step(opt); s.update(); opt.zero_grad()",
    "grad scaler overflow": "s = torch.amp.GradScaler('cpu', init_scale=1e30)\n"
    "\n"
    "opt.zero_grad()\n"
    "\n"
    "for k in (30, 31): s.scale(forward(k) * 1e20).backward(); s.step(opt); s.update(); opt.zero_grad()",
    "gan": "torch.manual_seed(1); D = DDP(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))); "
    "oD = torch.optim.Adam(D.parameters(), 0.01)\n"
    "import dear\n"
    "eD = None if run.plain else dear.attach(D, oD, update='sharded' if run.case.how=='sharded' else 'rep"
    "licated', bucket_cap_mb=0.002)\n"
    "\n"
    "for k in range(30, 34):\n"
    "    fake = model(x(k)); d = F.softplus(-D(y(k))).mean() + F.softplus(D(fake.detach())).mean(); "
    "note(d); d.backward(); oD.step(); oD.zero_grad()\n"
    "    D.requires_grad_(False); g = F.softplus(-D(fake)).mean(); note(g); g.backward(); opt.step(); "
    "opt.zero_grad(); D.requires_grad_(True)\n"
    "note(list(D.parameters()))\n"
    "\n"
    "if eD: eD.detach()",
    "second optimizer": "o2 = torch.optim.SGD(params[-1:], 0.1)\n"
    "\n"
    "opt.zero_grad()\n"
    "\n"
    "forward(30).backward(); o2.step(); opt.step()",
    "lr tensor": "opt.param_groups[0]['lr'] = torch.tensor(0.01)\n"
    "\n"
    "train(30)\n"
    "\n"
    "opt.param_groups[0]['lr'].fill_(0.02)\n"
    "\n"
    "train(31)",
    "optimizer pickled": "o = pickle.loads(pickle.dumps(opt)); note(o.state_dict()['state'])",
    "stack state": "note(torch.func.stack_module_state([net])[0])",
    "net hook": "net.register_forward_pre_hook(lambda m, a: note(params[0].sum()))",
    "update_bn": "torch.optim.swa_utils.update_bn([x(9)], net)",
    "interrupted forward": "try:\n"
    "    h = net.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(KeyboardInterrupt()))\n"
    "    forward(30)\n"
    "except KeyboardInterrupt: pass\n"
    "finally: h.remove()",
    "storage": "note(torch.tensor(params[0].untyped_storage().nbytes() >= params[0].nbytes)); "
    "note(torch.tensor([], dtype=params[0].dtype).set_(params[0].untyped_storage(), params[0].storage_off"
    "set(), params[0].shape, params[0].stride()))",
    "resize": "with torch.no_grad(): params[0].resize_(37, 16)",
    "vmap over models": "note(torch.vmap(lambda w: (w * 2).sum())(params[0]))",
    "hessian": "note(torch.func.hessian(lambda w: (w * w).sum())(params[1]))",
    "state_dict hook": "net._register_state_dict_hook(lambda m, s, *_: s.update({k: v * 1 for k, v in s.items()})); "
    "note(net.state_dict())",
    "new module": "net.extra = nn.Linear(2, 2)",
    "buffers": "net.register_buffer('mean', params[0].detach().mean()); note(net.mean)",
    "named": "note([n for n, p in net.named_parameters() if isinstance(p, nn.Parameter)]); "
    "note(nn.Parameter(params[0]).sum()); note(sum(p.numel() for p in net.parameters() if p.requires_grad))",
    "types": "note(isinstance(params[0], nn.Parameter) and issubclass(type(params[0]), nn.Parameter)); "
    "note(params[0].type()); note(params[0].is_shared()); note(str(params[0].dtype))",
    "nested tensor": "note(torch.nested.nested_tensor([params[1].detach(), params[3].detach()]).unbind()[0])",
    "as_tensor": "note(torch.as_tensor(params[0])); import numpy; "
    "note(torch.from_numpy(numpy.asarray(params[0].detach()).copy()))",
    "grad mode writes": "params[0].requires_grad_(False); params[0].add_(0.01); params[0].requires_grad_(True)",
    "zip swap": "params[0].data, params[2].data = params[0].data * 1.0, params[2].data * 0.5",
    "closure lambda": "opt.zero_grad()\n"
    "\n"
    "def c():\n"
    "    opt.zero_grad(); l = forward(30); l.backward(); return l\n"
    "opt.step(c)",
    "detach_": "params[0].detach_()",
    "pin": "note(params[0].is_pinned())",
    "bool index": "note(params[0][params[0] > 0].sum())",
    "einsum": "note(torch.einsum('ij,kj->ik', params[0], x(9)))",
    "jit script": "note(torch.jit.script(net.first)(x(9)))",
    "torchsave net": "f = io.BytesIO(); torch.save(net, f)",
    "module to_empty": "net.to_empty(device='cpu'); [p.data.fill_(0.01) for p in params]",
    "type(p)(...)": "q = type(params[0])(params[0].detach().clone()); note(q); q.add(1)",
    "deepcopy list": "note(copy.deepcopy(params)); note(copy.deepcopy({'a': params[0]})['a'])",
    "named tuple": "import collections; T = collections.namedtuple('T', 'w'); note(T(params[0]).w.sum())",
    "dataclass arg": "import dataclasses\n"
    "@dataclasses.dataclass\n"
    "class A: w: object\n"
    "note(torch.stack([A(params[1]).w, A(params[1]).w]))",
    "multi process": "import torch.multiprocessing as mp; from torch.multiprocessing.reductions import reduce_tensor; "
    "r = reduce_tensor(params[0].detach()); note(len(r))",
    "profile": "from torch.profiler import profile\n"
    "with profile() as prof: note(model(x(9)))",
    "hook on accumulation": "a = params[0].view_as(params[0]).grad_fn.next_functions[0][0]; "
    "h = a.register_hook(lambda *_: None)",
}  # fmt: skip
MAY_REFUSE = ["copy model", "torchsave net"]
SHARDED_MAY_REFUSE = [
    "class step",
    "clip torch",
    "grad scaler",
    "grad scaler overflow",
    "module to_empty",
    "optimizer pickled",
    "second optimizer",
    "share_memory",
]


def case(code, how):
    program = f"{WARM}\n\nahead(3)\n\n{code}{TAIL}"
    return Case(how, program=pieces(program), optimizer=("AdamW", {"lr": 0.01}))


PART = 24  # as many kinds as are tried well within a test's time, on a machine that is busy, too
ALL = [*KINDS.items(), *MORE.items()]
PARTS = [dict(ALL[at : at + PART]) for at in range(0, len(ALL), PART)]


@pytest.mark.parametrize("kinds", PARTS, ids=lambda part: f"from {next(iter(part))}")
def test_unforeseen_use_changes_nothing(pool2, kinds):
    """Many cases in a few process groups: each by itself would cost more than it does."""
    cases = {(name, how): case(code, how) for name, code in kinds.items() for how in BOTH}
    refusable = {(name, how) for name in MAY_REFUSE for how in BOTH} | {
        (name, "sharded") for name in SHARDED_MAY_REFUSE
    }
    outcomes = dict(zip(cases, run(pool2, list(cases.values())), strict=True))
    wrong = {
        about: f"{outcome.kind} at {outcome.at!r}: {outcome.text}"
        for about, outcome in outcomes.items()
        if outcome.kind != "equal" and not (outcome.kind == "refused" and about in refusable)
    }
    assert not wrong, "\n".join(f"{how}, {name}: {text}" for (name, how), text in wrong.items())
