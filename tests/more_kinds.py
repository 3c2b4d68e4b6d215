"""More uses for test_silence_kinds.py: operators, storages, hooks, schedulers, gradients, copies of modules."""

#: As KINDS there. None of them may be refused.
MORE = {
    "lora freeze": "net.first.requires_grad_(False); net.second.requires_grad_(False)",
    "autograd.Function": "class Fn(torch.autograd.Function):\n"
    "    @staticmethod\n"
    "    def forward(ctx, w): ctx.save_for_backward(w); return w * 2\n"
    "    @staticmethod\n"
    "    def backward(ctx, g): return g * 2\n"
    "note(Fn.apply(params[0]).sum())",
    "grad through param": "opt.zero_grad()\n"
    "\n"
    "(forward(30) + 0.01 * sum(p.square().sum() for p in params)).backward(); opt.step()",
    "l2 before forward": "opt.zero_grad()\n"
    "\n"
    "reg = 0.01 * sum(p.square().sum() for p in params)\n"
    "(forward(30) + reg).backward(); opt.step()",
    "saved graph over step": "opt.zero_grad()\n"
    "\n"
    "out = net(x(9)).sum()\n"
    "\n"
    "train(30)\n"
    "\n"
    "note(out)",
    "stale graph backward": "opt.zero_grad()\n"
    "\n"
    "out = params[0].sin().sum()\n"
    "\n"
    "train(30)\n"
    "\n"
    "note(torch.autograd.grad(out, params[0]))",
    "checkpoint fn": "from torch.utils.checkpoint import checkpoint\n"
    "opt.zero_grad()\n"
    "\n"
    "loss = checkpoint(lambda a: model(a).square().mean(), x(9), use_reentrant=False); loss.backward(); "
    "opt.step()",
    "threads": "with ThreadPoolExecutor(2) as pool: [note(r) for r in pool.map(lambda k: net(x(k)), range(4))]",
    "numpy write later": "a = params[0].detach().numpy()\n"
    "\n"
    "train(30)\n"
    "\n"
    "a[0] = 0.5; note(params[0])\n"
    "\n"
    "train(31)\n"
    "\n"
    "note(torch.from_numpy(a.copy()))",
    "view kept": "v = params[0].detach()[0]\n"
    "\n"
    "train(30)\n"
    "\n"
    "note(v)\n"
    "\n"
    "train(31)\n"
    "\n"
    "note(v); v.zero_()",
    "data kept": "d = params[0].data\n"
    "\n"
    "train(30)\n"
    "\n"
    "d.mul_(0.5)\n"
    "\n"
    "train(31); note(d)",
    "module replaced by itself": "net.second = net.second",
    "param reassigned": "net.second.weight = net.second.weight",
    "prune later": "import torch.nn.utils.prune as prune; prune.l1_unstructured(net.first, 'weight', 0.3)",
    "load a part": "net.load_state_dict({k: v for k, v in net.state_dict().items() if 'last' in k}, strict=False)",
    "optimizer lists": "opt.param_groups[0]['lr'] = 0.02; "
    "note(sorted(k for k in opt.param_groups[0] if k != 'params')); "
    "note(len(opt.param_groups[0]['params'])); note(opt.defaults['lr'])",
    "optimizer repr": "note(repr(opt))",
    "net repr": "note(repr(net)); note(str(params[1]))",
    "format": "note(f'{params[1].sum():.4f}'); note(float(params[1][0])); note(int(params[1].numel()))",
    "hash and id": "note(len({params[0]: 1, params[1]: 2})); note(params[0] in set(params)); "
    "note(id(params[0]) == id(net.first.weight))",
    "dist broadcast params": "[dist.broadcast(p.data, 0) for p in params]",
    "dist gather": "out = [torch.empty_like(params[1]) for _ in range(2)]; "
    "dist.all_gather(out, params[1].detach()); note(out)",
    "dist reduce param": "with torch.no_grad(): dist.all_reduce(params[1]); params[1].div_(2)",
    "coalesced": "dist._broadcast_coalesced(dist.group.WORLD, [p.data for p in params], 1000, 0)",
    "zero redundancy": "note(torch._utils._flatten_dense_tensors([p.data for p in params]))",
    "is_leaf": "note(all(p.is_leaf for p in params)); note(params[0].grad_fn is None); note(params[0].output_nr); "
    "note(params[0].names)",
    "version": "note(params[0]._version >= 0)",
    "untyped copy": "params[0].untyped_storage().copy_(torch.full((37, 16), 0.02).untyped_storage())",
    "untyped fill": "params[1].untyped_storage().fill_(0)",
    "storage clone": "note(torch.tensor(params[1].untyped_storage().clone().tolist()[:8]))",
    "typed storage": "import warnings; warnings.simplefilter('ignore'); note(params[1].storage()[0])",
    "rand like": "torch.manual_seed(5); note(torch.rand_like(params[0])); note(torch.zeros_like(params[0])); "
    "note(params[0].new_zeros(3))",
    "where": "note(torch.where(params[0] > 0, params[0], 0.0)); note(params[0] @ params[0].T); note(-params[0]); "
    "note(params[0] ** 2); note(2 * params[0]); note(params[0] == params[0])",
    "cat nested": "note(torch.cat([torch.cat([p.flatten() for p in params])])); "
    "note(torch.block_diag(*[p for p in params if p.dim() == 2]))",
    "inplace ops": "with torch.no_grad():\n"
    "    w = params[0]; w += 0.01; w *= 0.99; w[1:3] -= 0.1; w.T.mul_(0.9); w.view(-1)[0] = 1.0; "
    "w.flatten()[1] = 2.0",
    "index put": "with torch.no_grad(): params[0].index_put_((torch.tensor([0]), torch.tensor([1])), "
    "torch.tensor([0.3])); params[0].index_fill_(0, torch.tensor([2]), 0.1)",
    "lerp": "with torch.no_grad(): params[0].lerp_(torch.ones_like(params[0]), 0.1); "
    "torch.lerp(params[1], torch.ones_like(params[1]), 0.1, out=params[1])",
    "swap two": "with torch.no_grad():\n"
    "    t = params[1].clone(); params[1].copy_(params[3]); params[3].copy_(t)",
    "orthogonal": "torch.manual_seed(2); nn.init.orthogonal_(net.second.weight); nn.init.zeros_(net.last.bias); "
    "nn.init.kaiming_uniform_(net.first.weight)",
    "multi_tensor": "note(torch._foreach_add([p.detach() for p in params], 1.0)); note(torch._foreach_norm(params)); "
    "torch._foreach_mul_([p.data for p in params], 0.9)",
    "closure none": "opt.step(closure=None)",
    "grad none then step": "opt.zero_grad(); opt.step()",
    "scheduler chain": "s1 = torch.optim.lr_scheduler.LinearLR(opt, 0.5, 1.0, 3); "
    "s2 = torch.optim.lr_scheduler.ReduceLROnPlateau(opt)\n"
    "\n"
    "train(30); s1.step(); s2.step(1.0)\n"
    "\n"
    "train(31); s1.step(); note(opt.param_groups[0]['lr'])",
    "onecycle": "s1 = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10)\n"
    "\n"
    "train(30); s1.step()\n"
    "\n"
    "train(31); s1.step()",
    "step under no_grad": "opt.zero_grad()\n"
    "\n"
    "forward(30).backward()\n"
    "with torch.no_grad(): opt.step()",
    "eval mode train": "model.eval()\n"
    "\n"
    "train(30)\n"
    "\n"
    "model.train()",
    "net train alone": "opt.zero_grad()\n"
    "\n"
    "with model.no_sync(): forward(30).backward()\n"
    "\n"
    "opt.zero_grad()",
    "exception in step hook": "def bad(*_): raise ValueError('no')\n"
    "h = opt.register_step_pre_hook(bad)\n"
    "opt.zero_grad(); forward(30).backward()\n"
    "try: opt.step()\n"
    "except ValueError: pass\n"
    "h.remove(); opt.step()",
    "del grads": "opt.zero_grad(); forward(30).backward()\n"
    "for p in params: p.grad = None\n"
    "opt.step()",
    "grads replaced": "opt.zero_grad(); forward(30).backward()\n"
    "for p in params: p.grad = torch.full_like(p, 0.01)\n"
    "opt.step()",
    "grads detached": "opt.zero_grad(); forward(30).backward()\n"
    "for p in params: p.grad.detach_()\n"
    "opt.step()",
    "requires grad read": "note([p.requires_grad for p in params]); note([p.grad is None for p in params])",
    "data loader": "from torch.utils.data import DataLoader\n"
    "for b in DataLoader([x(k) for k in range(4)], batch_size=2, num_workers=1): note(net(b.flatten(0, 1)))",
    "fork": "note(in_a_fork(lambda: 3))",
    "memory format": "net.to(memory_format=torch.contiguous_format)",
    "functional_call ddp": "note(functional_call(model, {'module.last.bias': torch.zeros(8)}, (x(9),)))",
    "swapped modules": "net.first, kept = nn.Sequential(net.first), None",
    "buffers sync": "net.register_buffer('count', torch.zeros(1)); net.count += 1",
    "double backward hook": "h = net.register_full_backward_hook(lambda m, gi, go: None)",
    "forward hook out": "h = net.register_forward_hook(lambda m, a, o: o * 2)",
    "module hook on ddp": "h = model.register_forward_pre_hook(lambda m, a: note(params[0].sum())); "
    "h2 = model.register_forward_hook(lambda m, a, o: o * 2)",
    "ddp join": "note(hasattr(model, 'join'))",
    "state of ddp": "note(sorted(model.state_dict())); note(sorted(k for k, _ in model.named_parameters()))",
    "param tensor subclass": "note(nn.Parameter(params[0].data).sum()); note(torch.nn.Buffer(params[1].data).sum())",
    "requires_grad clone": "c = params[0].clone().requires_grad_(); note(c.is_leaf); "
    "note(params[0].clone().grad_fn is not None)",
    "masked": "note(params[0].masked_select(params[0] > 0)); note(params[0].nonzero()); note(params[0].topk(2)); "
    "note(params[0].max(0)); note(torch.sort(params[1])); note(params[1].unique())",
    "to sparse": "note(params[0].detach().to_sparse().to_dense()); note(params[0].to(torch.float64)); "
    "note(params[0].half()); note(params[0].cpu())",
    "quantile": "note(torch.quantile(params[0], 0.5)); note(torch.linalg.svdvals(params[0])); "
    "note(torch.histc(params[1])); note(torch.std_mean(params[0]))",
    "amp grad": "opt.zero_grad()\n"
    "\n"
    "with torch.autocast('cpu', torch.bfloat16): l = F.mse_loss(model(x(9)).float(), y(9))\n"
    "l.backward(); opt.step()",
    "dict of params": "d = nn.ParameterDict({'a': params[0]}); note(d['a'].sum()); l = nn.ParameterList(params); "
    "note(l[0].sum())",
    "sequential share": "s = nn.Sequential(net.first, nn.Tanh(), net.second); note(s(x(9)))",
    "ema module": "e = copy.deepcopy(net).requires_grad_(False)\n"
    "\n"
    "train(30)\n"
    "\n"
    "with torch.no_grad(): [a.mul_(0.9).add_(b, alpha=0.1) for a, b in zip(e.parameters(), net.parameters())]\n"
    "note(e(x(9)))",
    "make_fx": "from torch.fx.experimental.proxy_tensor import make_fx; note(make_fx(lambda a: net(a))(x(9))(x(9)))",
    "fx": "import torch.fx; g = torch.fx.symbolic_trace(net); note(g(x(9)))",
    "func linearize": "o, f = torch.func.vjp(net, x(9)); note(o); note(f(torch.ones_like(o)))",
}  # fmt: skip
