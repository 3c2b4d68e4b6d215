"""What a script may do, as pieces of programs with their labels. {p} stands for a parameter, {module} for a leaf."""

from __future__ import annotations

READS = {
    "note({p})": "read",
    "note({p}.data)": "read",
    "note({p}.sum())": "read",
    "note({p}.tolist())": "read",
    "note(repr({p}))": "read",
    "note(torch.from_numpy({p}.detach().numpy().copy()))": "read numpy",
    "note(torch.from_dlpack({p}.detach()).clone())": "read dlpack",
    "note(copy.copy({p}))": "read copy",
    "note(copy.deepcopy({p}))": "read copy",
    "note(pickle.loads(pickle.dumps({p})))": "read copy",
    "note(torch._foreach_norm(params))": "read foreach",
    "note(torch.stack([each.norm() for each in params]))": "read",
    "note(parameters_to_vector(params))": "read foreach",
    "with ThreadPoolExecutor(1) as pool: note(pool.submit({p}.clone).result())": "read in a thread",
    "note(dict(net.named_parameters()))": "read listing",
    "note(net.state_dict())": "read state_dict",
    "note(model.state_dict())": "read state_dict",
    "note(list(copy.deepcopy(net).parameters()))": "deepcopy model",
    "note(functional_call(net, dict(zip([name for name, _ in net.named_parameters()], params)), x(9)))": "functional",
    "file = io.BytesIO(); torch.save(list(params), file); file.seek(0); note(torch.load(file))": "read save",
}
WRITES = {
    "with torch.no_grad(): {p}.clamp_(-0.05, 0.05)": "write",
    "with torch.no_grad(): {p}.add_(0.01)": "write",
    "with torch.no_grad(): {p}[0] = 0.1": "write",
    "{p}.data.clamp_(-0.05, 0.05)": "write .data",
    "{p}.data.copy_(torch.full_like({p}, 0.02))": "write .data",
    "{p}.data.zero_()": "write .data",
    "{p}.data = {p}.data * 0.9": "set .data",
    "{p}.detach().mul_(0.9)": "write",
    "{p}.detach().numpy()[...] *= 0.5": "write numpy",
    "with torch.no_grad(): torch._foreach_mul_(params, 0.9)": "write foreach",
    "vector_to_parameters(parameters_to_vector(params).detach() * 0.9, params)": "vector_to_parameters",
    "nn.init.constant_({p}, 0.02)": "write",
    "with torch.no_grad(): torch.mul({p}, 0.9, out={p})": "write out",
    "dist.all_reduce({p}.data); {p}.data.div_(2)": "write collective",
    "net.apply(lambda m: m.weight.data.clamp_(-0.1, 0.1) if isinstance(m, nn.Linear) else None)": "write apply",
}
STATE = {
    "note(optimizer_state()['state'])": "optimizer state",
    "ostate = copy.deepcopy(optimizer_state())": "optimizer state",
    "load_optimizer(copy.deepcopy(ostate))": "load optimizer",
    "saved = copy.deepcopy(net.state_dict())": "read state_dict",
    "net.load_state_dict(saved)": "load model",
    "model.load_state_dict({{'module.' + k: v for k, v in saved.items()}})": "load model",
    "note(copy.deepcopy(opt).state_dict()['state'])": "copy optimizer",
    "note([sorted(opt.state[p].items()) for p in params[:2] if p in opt.state])": "optimizer.state",
    "opt.state.clear()": "optimizer.state clear",
    "note(opt.state_dict()['state'])": "optimizer.state_dict",
}
AVERAGES = {
    "shadow = [p.detach().clone() for p in params]": "ema",
    "with torch.no_grad(): [s.lerp_(p, 0.5) for s, p in zip(shadow, params)]": "ema",
    "for i, p in enumerate(params): p.data, shadow[i] = shadow[i], p.data": "ema swap",
    "slow = [p.detach().clone() for p in params]": "lookahead",
    "for s, p in zip(slow, params): s.add_(p.data - s, alpha=0.5); p.data.copy_(s)": "lookahead",
    "swa = AveragedModel(net)": "swa",
    "swa.update_parameters(net); note(list(swa.module.parameters()))": "swa",
    "alias = {p}.detach()": "alias",
    "note(alias)": "alias",
}
FORWARDS = {
    "with torch.no_grad(): note(model(x(9)))": "eval",
    "with torch.inference_mode(): note(model(x(9)))": "inference_mode",
    "model.eval(); note(model(x(9))); model.train()": "eval with grad",
    "with torch.no_grad(): note(net(x(9)))": "eval inner",
    "note(net(x(9)))": "inner with grad",
    "with raising({module!r}): model(x(9))": "raise in forward",
    "with torch.no_grad(), raising({module!r}): model(x(9))": "raise in eval",
    "model(x(9))": "forward alone",
}
HYPER = {
    "opt.param_groups[0]['lr'] *= 0.5": "lr",
    "opt.param_groups[-1]['weight_decay'] = 0.1": "lr",
    "scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)": "scheduler",
    "scheduler.step()": "scheduler",
}
GRADS = {
    "note({p}.grad)": "read grad",
    "{p}.grad.mul_(0.5)": "write grad",
    "{p}.grad = None": "drop grad",
    "torch.nn.utils.clip_grad_value_(params, 0.01)": "clip value",
    "clip(1e6, 2.0)": "clip",
    "clip(0.01, float('inf'))": "clip",
}
ENGINE = {
    "detach()": "detach",
    "attach()": "detach",
    "detach(); attach()": "detach",
    "if run.engine: run.engine.synchronize()": "synchronize",
    "if run.engine: run.engine.bucket_cap_mb = 0.004": "recap",
}
FREEZING = {
    "{p}.requires_grad_(False)": "freeze",
    "{p}.requires_grad_(True)": "freeze",
    "net.requires_grad_(True)": "freeze",
}
LAYOUT = {
    "net.to(memory_format=torch.channels_last)": "channels_last",
    "opt.add_param_group({{'params': params[-1:]}})": "add_param_group",
}
HOOKS = {
    "{p}.register_hook(lambda grad: grad * 0.5)": "tensor hook",
    "handle = {p}.register_hook(lambda grad: grad * 0.5)": "tensor hook",
    "handle.remove()": "tensor hook",
    "net.get_submodule({module!r}).register_forward_hook(lambda module, args, output: note(output))": "forward hook",
    "net.get_submodule({module!r}).register_forward_hook(lambda module, args, output: output * 0.5)": "forward hook",
    "net.get_submodule({module!r}).register_full_backward_hook(lambda m, i, o: note(list(o)))": "backward hook",
    "model.register_forward_pre_hook(lambda module, args: note(params[0]))": "forward hook",
    "opt.register_step_pre_hook(lambda opt, args, kwargs: note(params[0]))": "step hook",
    "opt.register_step_post_hook(lambda opt, args, kwargs: note(params[0]))": "step hook",
    "opt.register_step_pre_hook(lambda *_: params[0].grad is None or params[0].grad.mul_(0.5))": "step hook writes",
}
MORE_GRADS = {
    "note([p.grad for p in params if p.grad is not None])": "read grads",
    "for p in params: p.grad = None if p.grad is None else p.grad * 0.5": "replace grads",
    "for p in params: p.grad = None if p.grad is None else p.grad.clone()": "replace grads",
    "for p in params: p.grad is None or p.grad.add_(0.01)": "write grads",
    "torch._foreach_mul_([p.grad for p in params if p.grad is not None], 0.5)": "write grads",
    "for p in params: p.grad is None or dist.all_reduce(p.grad)": "reduce grads",
    "{p}.grad = torch.full_like({p}, 0.01)": "set grad",
    "inexact(); note(torch.nn.utils.clip_grad_norm_(params, 0.01).round(decimals=4))": "torch clips",
}
STRUCTURE = {
    "net.share_memory()": "share_memory",
    "net.to(params[-1].dtype)": "cast to its own",
    "net.to('cpu')": "cast to its own",
    "model.eval()": "eval",
    "model.train()": "eval",
    "torch.manual_seed(5); [m.reset_parameters() for m in net.modules() if hasattr(m, 'reset_parameters')]": "reset",
    "note(list(pickle.loads(pickle.dumps(net)).parameters()))": "pickle model",
    "import gc; gc.collect()": "collect",
    "note(in_a_fork(lambda: [p.detach().tolist() for p in params]))": "read in a fork",
    "note(torch.jit.trace(net, x(9), check_trace=False)(x(9)))": "trace",
    "note(torch.func.grad(lambda p: functional_call(net, p, x(9)).sum())(dict(net.named_parameters())))": "func grad",
    "note(torch.func.vmap(net)(x(9)[:, None]))": "vmap",
    "note(torch.autograd.grad(net(x(9)).sum(), params, allow_unused=True)[-1])": "autograd.grad",
    "total = torch.ones(1) * rank; dist.all_reduce(total); note(total)": "own collective",
    "dist.barrier()": "own collective",
    "[dist.broadcast(p.data, 0) for p in params]": "broadcast parameters",
}
OWN_OPTIMIZER = {
    "opt.load_state_dict(copy.deepcopy(opt.state_dict()))": "load its own state",
    "opt.state.pop({p}, None)": "optimizer.state pop",
    "[v.mul_(0.5) for s in opt.state.values() for v in s.values() if torch.is_tensor(v)]": "write optimizer.state",
    "opt.param_groups[0]['params'].reverse()": "reorder parameters",
    "opt.param_groups.reverse()": "reorder groups",
    "opt.param_groups[0]['params'].pop()": "drop from optimizer",
    "other = torch.optim.SGD(params, lr=0.01)": "another optimizer",
    "other.step()": "another optimizer",
    "scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=40)": "one cycle",
    "scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step)": "scheduler",
    "scheduler.step()": "scheduler",
    "opt.param_groups[0]['lr'] = torch.tensor(0.02)": "lr in a tensor",
    "opt.param_groups[0].update(lr=0.02)": "lr",
    "opt.zero_grad()": "zero_grad",
}
# Whole steps of their own, between two others.
WHOLE = {
    "def closure():\n    opt.zero_grad()\n    loss = forward(70)\n    loss.backward()\n    return loss\n"
    "note(opt.step(closure))": "closure with backward",
    "scaler = torch.amp.GradScaler('cpu', init_scale=8.0)": "scaler",
    "opt.zero_grad(); scaler.scale(forward(71)).backward(); scaler.step(opt); scaler.update()": "scaler",
    "opt.zero_grad(); scaler.scale(forward(72)).backward()\n"
    "scaler.unscale_(opt); scaler.step(opt); scaler.update()": "scaler unscales",
    "opt.zero_grad(); scaler.scale(forward(72)).backward(); inexact()\n"
    "scaler.unscale_(opt); clip(0.01, 2.0); scaler.step(opt); scaler.update()": "scaler clips",
    "opt.zero_grad()\nforward(73).backward()\nshift = [torch.full_like(p, 0.01) for p in params]\n"
    "with torch.no_grad(): [p.add_(s) for p, s in zip(params, shift)]\n"
    "opt.zero_grad()\nforward(73).backward()\n"
    "with torch.no_grad(): [p.sub_(s) for p, s in zip(params, shift)]\nopt.step()": "sam",
    "opt.zero_grad()\nv = x(74).requires_grad_()\nout = model(v)\n"
    "slope, = torch.autograd.grad(out.sum(), v, create_graph=True)\n"
    "loss = F.mse_loss(out, y(74)) + slope.pow(2).mean()\nnote(loss)\nloss.backward()\nopt.step()": "gradient penalty",
    "opt.zero_grad()\nwith model.join(): forward(75).backward(); opt.step()": "join",
    "opt.zero_grad()\nwith torch.autograd.detect_anomaly(False): forward(76).backward()\nopt.step()": "anomaly",
    "opt.zero_grad()\nwith torch.autograd.graph.save_on_cpu(): loss = forward(77)\nloss.backward()\n"
    "opt.step()": "save on cpu",
    "opt.zero_grad()\nwith torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t): loss = forward(78)\n"
    "loss.backward()\nopt.step()": "saved tensors",
    "opt.zero_grad()\nwith model.no_sync(): loss = forward(79)\nloss.backward()\nopt.step()": "no_sync by halves",
    "opt.zero_grad()\nloss = forward(80)\nwith ThreadPoolExecutor(1) as pool: pool.submit(loss.backward).result()\n"
    "opt.step()": "backward in a thread",
    "opt.zero_grad()\nforward(81).backward()\n"
    "with ThreadPoolExecutor(1) as pool: pool.submit(opt.step).result()": "step in a thread",
    "opt.zero_grad()\nloss = forward(82)\ndetach()\nattach()\nloss.backward()\nopt.step()": "attach behind forward",
    "opt.zero_grad()\nforward(83).backward()\ndetach()\nopt.step()\nattach()": "detach behind backward",
    "opt.zero_grad()\nforward(84).backward()\nattach()\nopt.step()": "attach behind backward",
    "opt.zero_grad()\nwith torch.set_grad_enabled(True): forward(85).backward()\nopt.step()": "grad mode",
    "opt.zero_grad()\n(forward(86) * float('nan')).backward()\nskip = not all(bool(p.grad.isfinite().all()) "
    "for p in params if p.grad is not None)\nskip or opt.step()\nopt.zero_grad()": "nan that is skipped",
    "opt.zero_grad()\nloss = forward(87)\nif loss > 0: loss.backward(); opt.step()": "a loss that decides",
    "opt.zero_grad()\nF.mse_loss(net(x(88)), y(88)).backward()\nopt.step()": "inner passes",
}
