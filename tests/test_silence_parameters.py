"""Parameters that are not finished cannot be read or written by any road, without the wait.

Rank 0 leaves a step while none of its exchanges can have ended (``ahead``), and reads or writes at once.
"""

import pytest
from silence import WARM, check, silence

READS = {
    "attribute": "note(net.last.weight.clone())",
    "_parameters": "note(net.last._parameters['weight'].clone())",
    "get_parameter": "note(net.get_parameter('last.weight').clone())",
    "kept list": "note([p.clone() for p in params])",
    "param_groups": "note([p.clone() for p in opt.param_groups[0]['params']])",
    "data": "note([p.data.clone() for p in params])",
    "detach": "note([p.detach().clone() for p in params])",
    "numpy": "note(params[0].detach().numpy().tolist())",
    "array": "import numpy; note(numpy.asarray(params[0].data).tolist())",
    "dlpack": "note(torch.from_dlpack(params[0].detach()).clone())",
    "numpy dlpack": "import numpy; note(numpy.from_dlpack(params[0].detach()).tolist())",
    "address": "import ctypes; p = params[0]; note(list((ctypes.c_float * p.numel()).from_address(p.data_ptr())))",
    "storage": "p = params[0]; note(p.untyped_storage()[p.storage_offset() * 4:(p.storage_offset() + 9) * 4].tolist())",
    "tolist": "note(params[-1].tolist())",
    "item": "note(params[0][0, 0].item())",
    "repr": "note(repr(params[0]))",
    "format": "note(f'{params[-1][0]:.9f}')",
    "truth": "note(bool((params[-1] * 1e6).sum() > 0)); note((params[-1] > 0).tolist())",
    "iteration": "note([row.clone() for row in params[0]])",
    "foreach": "note(torch._foreach_norm(params))",
    "total norm": "note(nn.utils.get_total_norm([p.detach() for p in params]))",
    "vector": "note(parameters_to_vector(params))",
    "stack": "note(torch.stack([params[1], params[3]]))",
    "out of another": "t = torch.empty(0); torch.mul(params[0].detach(), 2, out=t); note(t)",
    "copied into another": "t = torch.empty(37, 16); t.copy_(params[0].detach()); note(t)",
    "copy": "note(copy.copy(params[0]).clone())",
    "deepcopy": "note(copy.deepcopy(params))",
    "pickle": "note(pickle.loads(pickle.dumps(params)))",
    "save": "file = io.BytesIO(); torch.save(params, file); file.seek(0); note(torch.load(file))",
    "state_dict kept": "note(kept_state)",
    "state_dict with variables": "note({k: v.clone() for k, v in net.state_dict(keep_vars=True).items()})",
    "named_parameters kept": "note({name: p.clone() for name, p in named.items()})",
    "alias": "note(alias)",
    "view": "note(row)",
    "parameter list": "note(list(nn.ParameterList(params)))",
    "functional call": "note(functional_call(net, named, x(9)))",
    "gradient by func": "f = lambda ps: functional_call(net, ps, x(9)).square().sum()\nnote(torch.func.grad(f)(named))",
    "vmap": "note(torch.vmap(lambda row: row.sum())(params[0]))",
    "jvp": "note(torch.func.jvp(lambda w: (w * w).sum(), (params[0].detach(),), (torch.ones(37, 16),)))",
    "trace": "import warnings; warnings.simplefilter('ignore'); note(torch.jit.trace(net, x(9))(x(9)))",
    "copy of the module": "with torch.no_grad(): note(copy.copy(net)(x(9)))",
    "deepcopy of the module": "with torch.no_grad(): note(copy.deepcopy(net)(x(9)))",
    "child called alone": "with torch.no_grad(): note(net.last(torch.ones(2, 37)))",
    "method of a child": "with torch.no_grad(): note(type(net.last).forward(net.last, torch.ones(2, 37)))",
    "thread": "with ThreadPoolExecutor(1) as pool: note(pool.submit(params[0].clone).result())",
    "inference mode": "with torch.inference_mode(): note(params[0].sum())",
    "penalty before forward": "penalty = sum(p.square().sum() for p in params); opt.zero_grad()\n"
    "(forward(8) + 0.1 * penalty).backward()",
    "hook of another layer": "h = net.first.register_forward_pre_hook(lambda m, a: note(net.last.weight.clone()))\n"
    "forward(8)\nh.remove()",
    "early hook of the model": "h = model.register_forward_pre_hook(lambda m, a: note(net.last.weight.clone()), "
    "prepend=True)\nforward(8)\nh.remove()",
    "averaged model": "swa.update_parameters(net); note(list(swa.module.parameters()))",
    "exponential average": "with torch.no_grad(): [s.lerp_(p, 0.5) for s, p in zip(shadow, params)]\nnote(shadow)",
    "broadcast": "t = params[0].detach(); dist.all_reduce(t); note(t); t.div_(2)",
    "hash of bytes": "import hashlib; note(hashlib.sha1(params[0].detach().numpy().tobytes()).hexdigest())",
    "equality": "note(torch.equal(params[0], before))",
    "fork": "note(in_a_fork(lambda: params[0].tolist()))",
}  # fmt: skip
ALIASES = {
    "state_dict kept": "kept_state = net.state_dict()",
    "alias": "alias = params[0].detach()",
    "view": "row = params[0].data[0]",
}
SETUP = """
named = dict(net.named_parameters())
before = params[0].detach().clone()
swa = AveragedModel(net)
shadow = [p.detach().clone() for p in params]
opt.zero_grad()
"""


def step_before(name: str) -> str:
    """The step whose parameters are read: one that rank 0 leaves early, but for a reader that has an alias from before,
    for which a step waits until everything is finished."""
    if name not in ALIASES:
        return "ahead(3)"
    return f"{ALIASES[name]}\n\nforward(3).backward()\n\nlate(1)\nopt.step()"


READS_THAT_MAY_REFUSE = {"fork", "trace", "copy of the module"}


@pytest.mark.parametrize(
    ("case", "may_refuse"),
    [
        test
        for name, code in READS.items()
        for test in silence(
            f"read {name}",
            f"{WARM}\n\n{SETUP}\n\n{step_before(name)}\n\n{code}\n\nopt.zero_grad()\n\ntrain(4)",
            may_refuse=name in READS_THAT_MAY_REFUSE,
        )
    ],
)
def test_reads_see_finished_parameters(pool2, case, may_refuse):
    check(pool2, case, may_refuse)


WRITES = {
    "clipped": "[p.data.clamp_(-0.05, 0.05) for p in params]",
    "clipped by attribute": "for layer in (net.first, net.second, net.last): layer.weight.data.clamp_(-0.05, 0.05)",
    "clipped by param_groups": "with torch.no_grad(): [p.clamp_(-0.05, 0.05) for p in opt.param_groups[0]['params']]",
    "clipped by apply": "net.apply(lambda m: m.weight.data.clamp_(-0.1, 0.1) if isinstance(m, nn.Linear) else None)",
    "added": "with torch.no_grad(): params[0].add_(0.01)",
    "one element": "with torch.no_grad(): params[0][0] = 0.5",
    "copied": "with torch.no_grad(): params[0].copy_(torch.full((37, 16), 0.02))",
    "masked": "with torch.no_grad(): params[0].masked_fill_(torch.eye(37, 16).bool(), 0.0)",
    "out": "with torch.no_grad(): torch.mul(params[0], 0.5, out=params[0])",
    "foreach": "with torch.no_grad(): torch._foreach_mul_(params, 0.9)",
    "foreach copy": "with torch.no_grad(): torch._foreach_copy_(params, [p.detach() * 0.9 for p in params])",
    "init": "torch.manual_seed(5); nn.init.xavier_uniform_(params[0])",
    "reset": "torch.manual_seed(5); net.last.reset_parameters()",
    "numpy": "params[0].detach().numpy()[...] *= 0.5",
    "dlpack": "torch.from_dlpack(params[0].detach()).mul_(0.5)",
    "vector": "vector_to_parameters(torch.full((sum(p.numel() for p in params),), 0.02), params)",
    "data set": "params[0].data = torch.full((37, 16), 0.02)",
    "data set from itself": "for p in params: p.data = p.data * 0.9",
    "alias": "alias.mul_(0.5)",
    "view": "row.zero_()",
    "state_dict kept": "[v.mul_(0.9) for v in kept_state.values()]",
    "loaded": "net.load_state_dict({k: v * 0.9 for k, v in net.state_dict().items()})",
    "loaded, not strictly": "net.load_state_dict({'last.bias': torch.ones(8)}, strict=False)",
    "loaded into a child": "net.last.load_state_dict({'weight': torch.ones(8, 37) * 0.1, 'bias': torch.ones(8)})",
    "broadcast": "dist.broadcast(params[0].data, 1)",
    "in a thread": "with ThreadPoolExecutor(1) as pool: pool.submit(params[0].data.mul_, 0.5).result()",
    "lookahead": "for s, p in zip(slow, params): s.add_(p.data - s, alpha=0.5); p.data.copy_(s)",
    "swapped": "for i, p in enumerate(params): p.data, shadow[i] = shadow[i], p.data\n"
    "with torch.no_grad(): note(model(x(7)))\nfor i, p in enumerate(params): p.data, shadow[i] = shadow[i], p.data",
    "swapped for good": "for i, p in enumerate(params): p.data, shadow[i] = shadow[i], p.data",
    "swapped by copy": "old = [p.detach().clone() for p in params]\nwith torch.no_grad(): torch._foreach_copy_(params, "
    "shadow)\nnote(net(x(7)))\nwith torch.no_grad(): torch._foreach_copy_(params, old)",
    "stochastic averaging": "swa.update_parameters(net)\nwith torch.no_grad():\n"
    "    for p, s in zip(params, swa.module.parameters()): p.copy_(s)",
    "normalized": "with torch.no_grad(): F.normalize(params[0], out=params[0])",
    "pruned": "with torch.no_grad(): params[0].mul_((params[0].abs() > 0.1).float())",
    "to zero": "params[0].detach().zero_(); params[1].data.zero_()",
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "may_refuse"),
    [
        test
        for name, code in WRITES.items()
        for test in silence(
            f"write {name}",
            f"{WARM}\n\n{SETUP}\nslow = [p.detach().clone() for p in params]\n\n{step_before(name)}\n\n{code}\n\n"
            "opt.zero_grad()\n\ntrain(4)\n\ntrain(5)",
        )
    ],
)
def test_writes_are_not_lost(pool2, case, may_refuse):
    check(pool2, case, may_refuse)
