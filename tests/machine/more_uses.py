"""What a script may do with two optimizers, with the engine's state, and by attaching anew. {p} stands for a parameter.

Two optimizers step one after another, or by turns, or one of them seldom, as those of a GAN or of two time scales do.
"""

from __future__ import annotations

STEPS = {
    "opt.step(); opt2.step()": (12, ""),
    "opt2.step(); opt.step()": (3, "second first"),
    "opt.step()": (2, "one steps"),
    "opt2.step()": (2, "one steps"),
    "opt.step(); opt.step(); opt2.step()": (1, "step twice"),
    "opt.step(); opt2.step(); opt.step()": (1, "step twice"),
    "opt.step(); opt.zero_grad(); opt2.step()": (1, "zeroed apart"),
    "opt2.step(); opt2.zero_grad(set_to_none=False); opt.step()": (1, "zeroed apart"),
    "opt.zero_grad(); opt2.step()": (1, "zeroed first"),
    "opt.step(lambda: None); opt2.step(lambda: None)": (1, "closure"),
    "opt.step(); note({p}); opt2.step()": (2, "read between"),
    "opt.step(); note(params); opt2.step(); note(params)": (1, "read between"),
    "opt.step(); {p}.data.mul_(0.9); opt2.step()": (1, "write between"),
    "opt.step(); {p}.grad.mul_(0.5); opt2.step()": (1, "write grad between"),
    "opt.step(); clip(0.01, 2.0); opt2.step()": (1, "clip between"),
    "opt.step()\nwith torch.no_grad(): note(model(x(60)))\nopt2.step()": (1, "eval between"),
    "opt.step(); late(rank); opt2.step()": (1, ""),
    "pass": (1, "no step"),
}
BY_TURNS = ("opt.step()", "opt2.step()")  # in place of these, with the label "by turns"
ZEROS = {
    "opt.zero_grad(); opt2.zero_grad()": (12, ""),
    "opt.zero_grad(set_to_none=False); opt2.zero_grad()": (2, "zero in place"),
    "model.zero_grad()": (2, "model.zero_grad"),
    "opt.zero_grad()": (2, "one is zeroed"),
    "opt2.zero_grad()": (2, "one is zeroed"),
    "inexact()": (1, "no zero_grad"),
}
# torch keeps the state of a parameter that no group lists.
OUT_AND_BACK = {
    "out.append((opt, opt.param_groups[0]['params'].pop()))": "out of its group",
    "out.append((opt, opt.param_groups[-1]['params'].pop(0)))": "out of its group",
    "while out: each, param = out.pop(); each.param_groups[0]['params'].append(param)": "back in its group",
}
TWO = {
    "opt2.param_groups[0]['lr'] *= 0.5": "lr",
    "scheduler = torch.optim.lr_scheduler.StepLR(opt2, 1, 0.5)": "scheduler",
    "scheduler.step()": "scheduler",
    "opt, opt2 = opt2, opt": "swapped",
    "with full_state(): note(opt2.state_dict()['state'])": "full state",
    "with full_state(): opt2.load_state_dict(copy.deepcopy(opt2.state_dict()))": "load in full state",
    "opt2.load_state_dict(copy.deepcopy(opt2.state_dict()))": "load its own state",
    "opt2.state.clear()": "optimizer.state clear",
    "opt2.add_param_group({{'params': params[-1:]}})": "add_param_group",
    "opt2.param_groups[0]['params'].append(opt.param_groups[0]['params'].pop())": "move to the other",
    "opt.param_groups[0]['params'].pop()": "drop from optimizer",
    "opt2.param_groups[0]['params'].extend(opt.param_groups.pop(0)['params'])": "move to the other",
    "opt2.register_step_pre_hook(lambda opt, args, kwargs: note(params[0]))": "step hook",
    "opt2.register_step_post_hook(lambda opt, args, kwargs: note(params[-1]))": "step hook",
}
# Whole steps of their own, between two others.
WHOLE = {
    "opt.zero_grad(); opt2.zero_grad()\nforward(90).backward()\nopt2.step()\nopt.zero_grad(); opt2.zero_grad()\n"
    "forward(91).backward()\nopt.step()": "gan",
    "opt2.zero_grad()\nforward(90).backward()\nopt2.step()\nopt.zero_grad()\nforward(91).backward()\n"
    "opt.step()": "gan that zeroes one",
    "for turn in range(3):\n    opt.zero_grad(); opt2.zero_grad()\n    forward(92 + turn).backward()\n"
    "    (opt, opt2)[turn == 2].step()": "critic",
    "opt.zero_grad(); opt2.zero_grad()\nloss = forward(93)\nloss.backward(retain_graph=True)\nopt.zero_grad()\n"
    "opt2.step()": "retained",
    "scaler = torch.amp.GradScaler('cpu', init_scale=8.0)\nopt.zero_grad(); opt2.zero_grad()\n"
    "scaler.scale(forward(94)).backward()\nscaler.step(opt); scaler.step(opt2); scaler.update()": "scaler of both",
    "scaler = torch.amp.GradScaler('cpu', init_scale=8.0)\nopt.zero_grad(); opt2.zero_grad()\n"
    "scaler.scale(forward(95)).backward()\nscaler.unscale_(opt); scaler.unscale_(opt2); clip(0.01, 2.0)\n"
    "scaler.step(opt); scaler.step(opt2); scaler.update()": "scaler of both clips",
    "opt.zero_grad(); opt2.zero_grad()\nforward(96).backward()\n"
    "inexact(); torch.nn.utils.clip_grad_norm_(opt.param_groups[0]['params'], 0.01)\n"
    "opt.step(); opt2.step()": "torch clips one",
    "opt.zero_grad(); opt2.zero_grad()\nforward(96).backward()\nopt.step()\ndetach()\nattach()\n"
    "opt2.step()": "attach between",
    "def closure():\n    opt.zero_grad(); opt2.zero_grad()\n    loss = forward(97)\n    loss.backward()\n"
    "    return loss\nnote(opt.step(closure)); opt2.step()": "closure with backward",
    "opt.zero_grad(); opt2.zero_grad()\nforward(98).backward()\nopt.step()\nsaved_run = save()\n"
    "opt2.step()": "saved between",
}
#: What the library saves and loads.
SAVES = {
    "with full_state(): note(opt.state_dict()['state'])": "full state",
    "with full_state(): opt.load_state_dict(copy.deepcopy(opt.state_dict()))": "load in full state",
    "with full_state(): [v.mul_(0.5) for s in opt.state.values() for v in s.values() if torch.is_tensor(v)]":
        "write in full state",
    "with full_state(): opt.state.pop({p}, None)": "pop in full state",
    "with full_state(), full_state(): note(opt.state_dict()['state'])": "full state twice",
    "saved_run = save()": "save",
    "load(saved_run)": "load",
    "load(save())": "save and load",
    "file = io.BytesIO(); torch.save(save(), file); file.seek(0); load(torch.load(file))": "save and load",
    "note(engine_state()['optimizer'])": "save",
}  # fmt: skip
#: {way} stands for another update.
ANEW = {
    "detach(); attach({way!r})": "another update",
    "saved_run = save(); detach(); attach({way!r}); load(saved_run)": "resume under another update",
    "detach(); attach({way!r}); load(saved_run)": "load under another update",
    "detach(); load(saved_run); attach({way!r})": "load under another update",
    "saved_run = save(); detach(); train(40); attach({way!r}); load(saved_run)": "resume under another update",
}
KEPT = {  # of gradients: what plain DDP writes into
    "kept = [p.grad for p in params if p.grad is not None]": "keep grads",
    "note(kept)": "keep grads",
    "for grad in kept: grad.zero_()": "keep grads",
    "for grad in kept: grad.mul_(0.5)": "keep grads",
    "{p}.grad = own = torch.zeros_like({p}); kept = [own]": "keep grads",
    "flat = [torch.zeros(2, *p.shape, dtype=p.dtype) for p in params if p.requires_grad]\n"
    "for p, buffer in zip([p for p in params if p.requires_grad], flat, strict=True): p.grad = buffer[0]": "keep grads",
    "note(flat)": "keep grads",
    "for buffer in flat: buffer.zero_()": "keep grads",
    "for buffer in flat: buffer.mul_(0.5)": "keep grads",
}
