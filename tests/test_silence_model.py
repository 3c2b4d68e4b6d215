"""What attach saw of the model, and what became of the model since: adopted as plain DDP would, or one sentence."""

import time

import pytest
import torch
from silence import BOTH, EVERY, WARM, check, check_told, silence, told
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear

TAIL = "\n\nfor step in range(3, 6): train(step)"
FIRST = "for p in net.first.parameters(): p.requires_grad_"
UNUSED = {"ddp": {"find_unused_parameters": True}}
GROUPS = {"groups": 2}
#: What a script may set on the DDP module itself; "early" before the first pass. Some of it DDP reads in every pass.
OPTIONS = {
    "static graph, early": ("model._set_static_graph()", {}),
    "unused parameters, early": ("model.find_unused_parameters = True", {}),
    "another group": ("model._update_process_group(dist.new_group([0, 1]))", {}),
    "parameters ignored": ("model.parameters_to_ignore = {'last.weight'}", {}),
    "a copy of the module": ("model.module = copy.deepcopy(net)", {}),
    "the module wrapped": ("class Outer(nn.Module):\n    def __init__(self): super().__init__(); self.inner = net\n"
                           "    def forward(self, x): return self.inner(x)\nmodel.module = Outer()", {}),
    "other parameters": ("torch.__future__.set_overwrite_module_params_on_conversion(True)\ntry: net.double().float()"
                         "\nfinally: torch.__future__.set_overwrite_module_params_on_conversion(False)", {}),
    "a hook": ("from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook\n"
               "model.register_comm_hook(None, allreduce_hook)", {}),
    "buffers": ("model.broadcast_buffers = False", {"model": "Convolution"}),
    "no reductions": ("model.require_backward_grad_sync = False\n\nforward(7).backward()\n\n"
                      "model.require_backward_grad_sync = True\n\nforward(8).backward(); opt.step(); opt.zero_grad()",
                      {}),
}  # fmt: skip
REFUSED = ("static graph, early", "unused parameters, early", "another group", "a hook")
CASES = [
    *[
        test
        for name, (code, options) in OPTIONS.items()
        for test in silence(f"DDP is given {name}", f"{'attach()' if 'early' in name else WARM}\n\n{code}{TAIL}", BOTH,
                            name in REFUSED, **options)
    ],
    *silence("frozen at attach", f"{FIRST}(False)\n\nattach()\n\n{FIRST}(True){TAIL}", EVERY, True),
    *silence("frozen at attach, thawed later", f"{FIRST}(False)\n\n{WARM}\n\n{FIRST}(True){TAIL}", EVERY, True,
             **UNUSED),
    *silence("frozen later", f"{WARM}\n\n{FIRST}(False){TAIL}", EVERY, **UNUSED),
    *silence("frozen and thawed", f"{WARM}\n\n{FIRST}(False)\n\ntrain(9)\n\n{FIRST}(True){TAIL}", EVERY, **UNUSED),
    *silence("frozen between backward and step", f"{WARM}\n\nforward(7).backward()\n\n{FIRST}(False)\n\nopt.step(); "
             f"opt.zero_grad()\n\n{FIRST}(True){TAIL}", EVERY, True, **UNUSED),
    *silence("frozen after step", f"{WARM}\n\nahead(3)\n\n{FIRST}(False)\n\nopt.zero_grad()\n\ntrain(4)\n\n"
             f"{FIRST}(True){TAIL}", ("sharded",), **UNUSED),
    *silence("detached while frozen", f"{WARM}\n\n{FIRST}(False)\n\ndetach()\n\n{FIRST}(True){TAIL}", may_refuse=True),
    *silence("all frozen, then detached", f"{WARM}\n\nnet.requires_grad_(False)\n\ndetach()\n\nnote(net(x(9)))\n\n"
             "net.requires_grad_(True)", may_refuse=True),
    *silence("all frozen, then evaluated", f"{WARM}\n\nahead(3)\n\nnet.requires_grad_(False)\n\nnote(net(x(9)))\n\n"
             "net.requires_grad_(True)\n\nopt.zero_grad()\n\ntrain(4)"),
    *silence("channels last", f"{WARM}\n\nnet.to(memory_format=torch.channels_last){TAIL}", EVERY, True,
             model="Convolution"),
    *silence("channels last by .data", f"{WARM}\n\nw = net.conv.weight; w.data = w.data.contiguous()"
             f"{TAIL}", EVERY, True, model="Convolution"),
    *silence("channels last before the first step", f"attach()\n\nw = net.conv.weight; w.data = w.data.contiguous()"
             f"{TAIL}", EVERY, True, model="Convolution"),
    *silence("a transposed storage", f"{WARM}\n\nw = net.second.weight; w.data = w.data.t().contiguous().t(){TAIL}",
             EVERY, True),
    *silence("tied by .data", f"net.second.weight.data = net.first.weight.data\n\n{WARM}{TAIL}", EVERY, True,
             model="Aliased"),
    *silence("tied in part by .data", f"net.last.weight.data = net.first.weight.data[:8]\n\n{WARM}{TAIL}", EVERY, True,
             model="Aliased"),
    *silence("tied by .data later", f"{WARM}\n\nnet.second.weight.data = net.first.weight.data{TAIL}", EVERY, True,
             model="Aliased"),
    *silence("two layers in one storage", "flat = torch.cat([net.first.weight.data, net.second.weight.data])\n"
             f"net.first.weight.data = flat[:16]\nnet.second.weight.data = flat[16:]\n\n{WARM}{TAIL}", EVERY, True,
             model="Aliased"),
    *silence("a group added", f"{WARM}\n\nopt.add_param_group({{'params': params[-1:]}}){TAIL}", EVERY, True, groups=0),
    *silence("a group added, pending", f"{WARM}\n\nahead(3)\n\nopt.add_param_group({{'params': params[-1:]}}){TAIL}",
             may_refuse=True, groups=0),
    *silence("a parameter in another group", f"{WARM}\n\na, b = opt.param_groups\nb['params'].append(a['params'].pop())"
             f"{TAIL}", EVERY, True, **GROUPS),
    *silence("a parameter in another group, pending", f"{WARM}\n\nahead(3)\n\na, b = opt.param_groups\n"
             f"b['params'].append(a['params'].pop())\n\nopt.zero_grad(){TAIL}", may_refuse=True, **GROUPS),
    *silence("a parameter left out", f"{WARM}\n\nopt.param_groups[0]['params'].pop(){TAIL}", EVERY, True),
    *silence("a parameter left out, pending", f"{WARM}\n\nahead(3)\n\nopt.param_groups[0]['params'].pop()\n\n"
             f"model.zero_grad(){TAIL}", may_refuse=True),
    *silence("groups swapped", f"{WARM}\n\nopt.param_groups.reverse(){TAIL}", EVERY, True, **GROUPS),
    *silence("groups swapped, pending", f"{WARM}\n\nahead(3)\n\nopt.param_groups.reverse()\n\nopt.zero_grad(){TAIL}",
             may_refuse=True, **GROUPS),
    *silence("groups replaced by copies", f"{WARM}\n\nopt.param_groups = [dict(g) for g in opt.param_groups]{TAIL}",
             EVERY, **GROUPS),
    *silence("a group's list replaced", f"{WARM}\n\ng = opt.param_groups[0]; g['params'] = list(g['params']){TAIL}",
             EVERY),
    *silence("static graph, attached later", f"for step in range(3): train(step)\n\nattach(){TAIL}", EVERY,
             ddp={"static_graph": True}),
    *silence("static graph, detached", f"{WARM}\n\ndetach(){TAIL}", ddp={"static_graph": True}),
    *silence("detached in the middle of a step", f"{WARM}\n\nforward(3).backward()\n\ndetach()\n\nopt.step(); "
             f"opt.zero_grad(){TAIL}"),
    *silence("detached before zero_grad", f"{WARM}\n\nahead(3)\n\ndetach()\n\nopt.step()\n\nopt.zero_grad(){TAIL}"),
    *silence("evaluation mode between", f"{WARM}\n\nahead(3)\n\nnet.eval(); note(model(x(8))); net.train()\n\n"
             f"opt.zero_grad(){TAIL}"),
    *silence("another depth", f"{WARM}\n\nfor name in ('first', 'second'): net.get_submodule(name)"
             f".register_forward_hook(lambda m, a, out: out * 0.5){TAIL}", EVERY),
    *silence("a layer left out of the forward", f"{WARM}\n\nnet.second.forward = lambda x: x{TAIL}", EVERY, **UNUSED),
    *silence("a layer swapped for a copy", f"{WARM}\n\nnet.second = copy.deepcopy(net.second){TAIL}", EVERY, True,
             **UNUSED),
    *silence("weight norm", f"{WARM}{TAIL}\n\nnote(net.first.weight)", EVERY, model="Normed"),
    *silence("weight norm, pending", f"{WARM}\n\nahead(3)\n\nnote(net.first.weight); note(net.last.weight)\n\n"
             f"opt.zero_grad(){TAIL}", model="Normed"),
    *silence("weight norm removed", f"{WARM}\n\nnn.utils.parametrize.remove_parametrizations(net.first, 'weight')"
             f"{TAIL}", EVERY, True, model="Normed", ddp={"find_unused_parameters": True}),
    *silence("pruned before", f"{WARM}\n\nahead(3)\n\nnote(net.first.weight)\n\nopt.zero_grad(){TAIL}", model="Pruned"),
    *silence("a raising forward", f"{WARM}\n\nahead(3)\n\nopt.zero_grad()\n\nwith raising('second'): model(x(9))"
             f"{TAIL}"),
    *silence("a raising evaluation", f"{WARM}\n\nahead(3)\n\nwith torch.no_grad(), raising('last'): model(x(9))\n\n"
             f"opt.zero_grad(){TAIL}"),
    *silence("one memory before the first pass", "opt.param_groups[0]['params'].reverse(); attach()\n\n"
             "net.second.weight.data = net.first.weight.data\n\nfor step in range(3): train(step)", BOTH, True,
             model="Aliased", optimizer=("SGD", {"lr": 0.05, "weight_decay": 0.5})),
    *silence("another class of parameters", f"{WARM}\n\nclass Own(nn.Parameter): pass\n"
             "note(params[0]); params[0].__class__ = Own\n\ntrain(3); train(4)\n\n"
             "note(params[0]); note(type(params[0]).__name__)"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_changes_of_the_model_are_seen(pool2, case, may_refuse):
    check(pool2, case, may_refuse)


@told
def tensor_parallel(rank, world, how):
    """DDP over one dimension of a mesh, tensor parallel over the other: DDP holds the local parts of DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def train(how):
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        model = DDP(net, device_mesh=mesh["dp"])
        opt = torch.optim.AdamW(net.parameters(), lr=0.05)
        compressor = compress.ACPSGD(rank=2, start_step=10**6)
        if how == "register":
            compress.register(model, compressor)
        elif how == "compressed":
            dear.attach(model, opt, compressor=compressor, bucket_cap_mb=0.002)
        elif how:
            dear.attach(model, opt, update=how, bucket_cap_mb=0.002)
        seen = []
        for step in range(4):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + rank // (world // 2)))
            model(x).square().mean().backward()
            if rank >= world // 2:
                time.sleep(0.05)  # the other half looks at parameters whose exchanges cannot have ended
            opt.step()
            opt.zero_grad()
            seen.append(net(x).detach())
            seen += [param.detach().clone() for param in opt.param_groups[0]["params"]]
        return seen

    for mine, theirs in zip(train(how), train(None), strict=True):
        assert torch.equal(mine, theirs), (mine - theirs).abs().max()


@pytest.mark.parametrize("how", ["sharded", "replicated", "compressed", "register"])
def test_tensor_parallel_parameters(pool4, how):
    check_told(pool4, tensor_parallel, how)
