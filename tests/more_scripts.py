"""More scripts for test_silence_scripts.py: schedules, hooks, swaps, loaders, other groups, GANs, SAM."""

ADAMW = ("AdamW", {"lr": 0.01})
MOMENTUM = ("SGD", {"lr": 0.05, "momentum": 0.9})

#: As SCRIPTS there.
MORE_SCRIPTS = {
    "cyclic betas": (
        "attach(); s = torch.optim.lr_scheduler.CyclicLR(opt, 0.001, 0.05, step_size_up=2, "
        "cycle_momentum=True, base_momentum=0.5)\n\n"
        "for k in range(5): train(k); s.step(); note([g['betas'][0] for g in opt.param_groups])",
        {"optimizer": ADAMW},
    ),
    "onecycle momentum": (
        "attach(); s = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8)\n\n"
        "for k in range(6): train(k); s.step(); note([(g['momentum'], g['lr']) for g in opt.param_groups])",
        {"optimizer": MOMENTUM},
    ),
    "lr tensor stepped by scheduler": (
        "opt.param_groups[0]['lr'] = torch.tensor(0.05); s = "
        "torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)\n\n"
        "attach()\n\n"
        "for k in range(5): train(k); s.step(); note(opt.param_groups[0]['lr'])",
        {"optimizer": ADAMW},
    ),
    "scheduler that reads state": (
        "attach()\n\n"
        "for k in range(5):\n"
        "    train(k)\n"
        "    st = optimizer_state()['state']\n"
        "    s = sum(float(v['exp_avg_sq'].sum()) for v in st.values() if 'exp_avg_sq' in v)\n"
        "    opt.param_groups[0]['lr'] = 0.01 / (1 + s)\n"
        "    note(s)",
        {"optimizer": ADAMW},
    ),
    "global step hooks": (
        "from torch.optim.optimizer import register_optimizer_step_pre_hook as pre, "
        "register_optimizer_step_post_hook as post\n"
        "attach(); a = pre(lambda o, *_: note(sum(p.sum() for g in o.param_groups for p in "
        "g['params']))); b = post(lambda o, *_: note(sum(p.sum() for g in o.param_groups for p in "
        "g['params'])))\n\n"
        "try:\n"
        "    for k in range(4): train(k)\n"
        "finally: a.remove(); b.remove()",
        {"optimizer": ADAMW},
    ),
    "swap tensors": (
        "attach()\n\n"
        "for k in range(2): train(k)\n\n"
        "q = nn.Parameter(net.first.weight.detach() * 0.5); "
        "torch.utils.swap_tensors(net.first.weight, q)\n\n"
        "for k in range(2, 5): train(k)",
        {"refuse": True},
    ),
    "share memory": (
        "attach()\n\nfor k in range(2): train(k)\n\nnet.share_memory()\n\nfor k in range(2, 5): train(k)",
        {"refuse": True},
    ),
    "loader holds the model, settled": (
        "from torch.utils.data import DataLoader, Dataset\n"
        "class D(Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, i):\n"
        "        with torch.no_grad(): return net(x(i))[0]\n"
        "attach(); train(0)\n\n"
        "for k in range(1, 3):\n"
        "    train(k); note(params[0].sum()); [p.sum() for p in params]\n"
        "    note(list(DataLoader(D(), num_workers=1)))",
        {},
    ),
    "manual update between backward and step": (
        "attach()\n\n"
        "for k in range(4):\n"
        "    forward(k).backward()\n"
        "    with torch.no_grad():\n"
        "        for p in params: p.mul_(0.99)\n"
        "    opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "manual update from grads": (
        "attach()\n\n"
        "for k in range(4):\n"
        "    forward(k).backward()\n"
        "    with torch.no_grad():\n"
        "        for p in params: p.sub_(0.01 * p.grad.sign())\n"
        "    opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW, "refuse": True},
    ),
    "manual sgd without the optimizer": (
        "attach()\n\n"
        "train(0)\n\n"
        "for k in range(1, 4):\n"
        "    forward(k).backward()\n"
        "    with torch.no_grad():\n"
        "        for p in params: p.sub_(p.grad, alpha=0.05)\n"
        "    opt.zero_grad()\n\n"
        "train(4)",
        {"optimizer": ADAMW, "refuse": True},
    ),
    "a second DDP": (
        "attach()\n\n"
        "for k in range(2): train(k)\n\n"
        "from torch.nn.parallel import DistributedDataParallel as W\n"
        "m2 = W(net)\n\n"
        "for k in range(2, 4): F.mse_loss(m2(x(k)), y(k)).backward(); opt.step(); opt.zero_grad()\n\n"
        "train(5)",
        {"refuse": True},
    ),
    "second DDP after detach": (
        "attach()\n\n"
        "for k in range(2): train(k)\n\n"
        "detach()\n\n"
        "from torch.nn.parallel import DistributedDataParallel as W\n"
        "m2 = W(net); import dear\n\n"
        "e2 = None if run.plain else dear.attach(m2, opt, bucket_cap_mb=0.002)\n\n"
        "for k in range(2, 5): F.mse_loss(m2(x(k)), y(k)).backward(); opt.step(); opt.zero_grad()\n\n"
        "note(params)\n\n"
        "if e2: e2.detach()",
        {"optimizer": ADAMW, "refuse": ("register",)},
    ),
    "exception inside forward, retried": (
        "attach()\n\nfor k in range(5):\n    if k % 2:\n        with raising('second'): model(x(k))\n    train(k)",
        {"optimizer": ADAMW},
    ),
    "uneven tails": (
        "attach()\n\n"
        "n = 0\n"
        "for k in range(7):\n"
        "    last = k % 3 == 2 or k == 6\n"
        "    with contextlib.nullcontext() if last else model.no_sync(): (forward(k) / (3 if k < 6 "
        "else 1)).backward()\n"
        "    if last: opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "broadcast parameters by hand": (
        "attach()\n\n"
        "for k in range(4):\n"
        "    train(k)\n"
        "    for p in net.state_dict().values(): dist.broadcast(p, src=1)",
        {"optimizer": ADAMW},
    ),
    "collectives on another group": (
        "g2 = dist.new_group([0, 1]); attach()\n\n"
        "for k in range(4):\n"
        "    forward(k).backward(); opt.step(); t = torch.ones(3) * (rank + k); dist.all_reduce(t, "
        "group=g2); note(t)\n"
        "    w = dist.all_reduce(params[0].detach().clone(), group=g2, async_op=True); "
        "opt.zero_grad(); w.wait()",
        {},
    ),
    "compiled step": (
        "run.exact, run.may_round = False, True  # compiled, it rounds otherwise; here it runs as it is\n\n"
        "attach()\n\n"
        "f = torch.compile(lambda: opt.step(), backend='eager')\n\n"
        "for k in range(3): forward(k).backward(); f(); opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "interleaved steps of two optimizers": (
        "import dear; torch.manual_seed(3)\n"
        "other = type(model)(nn.Linear(8, 8)); o2 = torch.optim.AdamW(other.parameters(), 0.01); attach()\n"
        "e2 = None if run.plain else dear.attach(other, o2)\n\n"
        "for k in range(4):\n"
        "    F.mse_loss(other(model(x(k))), y(k)).backward(); o2.step(); "
        "note(other.module.weight.sum()); opt.step(); o2.zero_grad(); opt.zero_grad()\n\n"
        "note(list(other.parameters()))\n\n"
        "if e2: e2.detach()",
        {"optimizer": MOMENTUM},
    ),
    "a discriminator and a generator": (
        "import dear; torch.manual_seed(3)\n"
        "D = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)); disc = type(model)(D); o2 "
        "= torch.optim.Adam(D.parameters(), 0.01); attach()\n"
        "e2 = None if run.plain else dear.attach(disc, o2, bucket_cap_mb=0.001)\n\n"
        "for k in range(4):\n"
        "    fake = model(x(k))\n"
        "    (disc(fake.detach()).mean() - disc(y(k)).mean()).backward(); o2.step(); o2.zero_grad()\n"
        "    for p in D.parameters(): p.data.clamp_(-0.1, 0.1)\n"
        "    for p in D.parameters(): p.requires_grad_(False)\n"
        "    (-D(model(x(k))).mean()).backward(); opt.step(); opt.zero_grad()\n"
        "    for p in D.parameters(): p.requires_grad_(True)\n\n"
        "note(list(D.parameters()))\n\n"
        "if e2: e2.detach()",
        {"optimizer": ADAMW, "refuse": True},
    ),
    "clip by hand with foreach": (
        "attach(); inexact()\n\n"
        "for k in range(4):\n"
        "    forward(k).backward(); n = torch.stack(torch._foreach_norm([p.grad for p in "
        "params])).norm(); c = (0.05 / (n + 1e-6)).clamp(max=1.0); torch._foreach_mul_([p.grad for "
        "p in params], c)\n"
        "    opt.step(); opt.zero_grad()",
        {"optimizer": ADAMW},
    ),
    "grad centralisation": (
        "attach()\n\n"
        "for k in range(4):\n"
        "    forward(k).backward()\n"
        "    for p in params:\n"
        "        if p.dim() > 1: p.grad.sub_(p.grad.mean(1, keepdim=True))\n"
        "    opt.step(); opt.zero_grad()",
        {"refuse": True},
    ),
    "zero some grads": (
        "attach()\n\n"
        "for k in range(4):\n"
        "    forward(k).backward()\n"
        "    if k % 2: net.first.weight.grad.zero_()\n"
        "    opt.step(); opt.zero_grad()",
        {"optimizer": MOMENTUM, "refuse": True},
    ),
    "multiply one grad": (
        "attach()\n\n"
        "for k in range(4):\n"
        "    forward(k).backward(); net.first.weight.grad.mul_(2.0); net.last.bias.grad *= 0.5; "
        "net.second.weight.grad /= 4\n"
        "    opt.step(); opt.zero_grad()",
        {"optimizer": MOMENTUM},
    ),
    "lr groups by layer changed": (
        "attach()\n\n"
        "for k in range(4):\n"
        "    for i, g in enumerate(opt.param_groups): g['lr'] = 0.01 * (i + 1) / (k + 1)\n"
        "    train(k)",
        {"optimizer": ADAMW, "groups": 2},
    ),
    "groups replaced by a copy": (
        "attach()\n\n"
        "for k in range(2): train(k)\n\n"
        "opt.param_groups = [dict(g) for g in opt.param_groups]\n\n"
        "for k in range(2, 5):\n"
        "    train(k); opt.param_groups[0]['lr'] *= 0.5",
        {"optimizer": ADAMW},
    ),
    "state loaded into opt": (
        "attach()\n\n"
        "for k in range(2): train(k)\n\n"
        "st = copy.deepcopy(optimizer_state()); opt.load_state_dict(st)\n\n"
        "for k in range(2, 5): train(k)",
        {"optimizer": ADAMW},
    ),
    "maximize switched": (
        "attach()\n\nfor k in range(5):\n    opt.param_groups[0]['maximize'] = k % 2 == 1\n    train(k)",
        {"optimizer": ADAMW},
    ),
    "decay and eps, changed": (
        "attach()\n\n"
        "for k in range(2): train(k)\n\n"
        "opt.param_groups[0]['weight_decay'] = 0.5; opt.param_groups[0]['eps'] = 1e-3\n\n"
        "for k in range(2, 4): train(k)",
        {"optimizer": ADAMW},
    ),
    "momentum switched on": (
        "attach()\n\n"
        "for k in range(2): train(k)\n\n"
        "opt.param_groups[0]['momentum'] = 0.9\n\n"
        "for k in range(2, 4): train(k)\n\n"
        "opt.param_groups[0]['momentum'] = 0.0; opt.param_groups[0]['nesterov'] = False\n\n"
        "for k in range(4, 6): train(k)",
        {},
    ),
    "two passes at two places": (
        "attach()\n\n"
        "for k in range(4):\n"
        "    forward(k).backward()\n"
        "    with torch.no_grad():\n"
        "        n = torch.stack([p.grad.norm() for p in params]).norm()\n"
        "    opt.zero_grad()\n"
        "    with torch.no_grad():\n"
        "        for p in params: p.add_(0.001)\n"
        "    forward(k).backward()\n"
        "    with torch.no_grad():\n"
        "        for p in params: p.sub_(0.001)\n"
        "    opt.step(); opt.zero_grad()",
        {"optimizer": MOMENTUM},
    ),
    "SAM, from gradients that are kept": (
        "attach()\n\n"
        "for k in range(4):\n"
        "    forward(k).backward()\n"
        "    e = [p.grad.detach().clone() * 0.05 for p in params]\n"
        "    opt.zero_grad()\n"
        "    with torch.no_grad():\n"
        "        for p, d in zip(params, e): p.add_(d)\n"
        "    forward(k).backward()\n"
        "    with torch.no_grad():\n"
        "        for p, d in zip(params, e): p.sub_(d)\n"
        "    opt.step(); opt.zero_grad()",
        {"optimizer": MOMENTUM, "refuse": True},
    ),
    "deepcopy of the model trains too": (
        "attach()\n\n"
        "for k in range(2): train(k)\n\n"
        "c = copy.deepcopy(net); o = torch.optim.SGD(c.parameters(), 0.1)\n\n"
        "for k in range(3): train(k + 2); F.mse_loss(c(x(k)), y(k)).backward(); o.step(); o.zero_grad()\n\n"
        "note(list(c.parameters()))",
        {"optimizer": ADAMW},
    ),
    "weight norm clamp in a forward hook": (
        "attach()\n\n"
        "def clampw(m, a):\n"
        "    with torch.no_grad(): m.weight.clamp_(-0.2, 0.2)\n"
        "h = net.second.register_forward_pre_hook(clampw)\n\n"
        "for k in range(4): train(k)",
        {},
    ),
    "reset of a layer": (
        "attach()\n\n"
        "for k in range(3):\n"
        "    train(k); torch.manual_seed(k); net.second.reset_parameters()\n"
        "    for q in net.second.parameters(): optimizer_state()",
        {"optimizer": ADAMW},
    ),
}
