"""Gradients that a script keeps: plain DDP writes the averages into what stands in ``.grad``, and so it is here, or one
sentence."""

import pytest
import torch
import torch.distributed as dist
import training
from silence import EVERY, IN_SHARDS, WARM, check, check_told, silence, told

import compress
import dear

FLAT = """
flat = torch.zeros(sum(p.numel() for p in params)); at = 0
for p in params: p.grad = flat[at:at + p.numel()].view_as(p); at += p.numel()
"""
STEPS = "\n\nfor step in range(3, 6):\n    flat.zero_()\n    forward(step).backward()\n    opt.step()"
LISTED = "\n\nforward(4).backward(); opt.step()\n\nforward(5).backward()\n\nnote(kept)\n\nopt.step()"
KEEP = "kept = [p.grad for p in params]"
PLAIN = f"\n\nforward(3).backward()\n\nnn.utils.clip_grad_norm_(params, 1e9); {KEEP}\n\nopt.step()"
CASES = [
    *silence("a flat buffer", f"attach()\n{FLAT}{STEPS}", EVERY, IN_SHARDS),
    *silence("a flat buffer before", f"{FLAT}\n\nattach(){STEPS}", EVERY, IN_SHARDS),
    *silence("a flat buffer later", f"{WARM}\n{FLAT}{STEPS}\n\nnote(flat)", EVERY, IN_SHARDS),
    *silence("a flat buffer that is read", f"attach()\n{FLAT}\n\nforward(3).backward()\n\nnote(flat)\n\nopt.step()",
             EVERY, IN_SHARDS),
    *silence("a flat buffer, scaled", f"attach()\n{FLAT}\n\nforward(3).backward()\n\nflat *= 0.5\n\nopt.step()",
             EVERY, IN_SHARDS),
    *silence("a flat buffer in DDP's own", f"attach()\n{FLAT}{STEPS}\n\nnote(flat)", EVERY,
             ddp={"gradient_as_bucket_view": True}),
    *silence("own tensors", f"{WARM}\n\nkept = [torch.zeros_like(p) for p in params]\nfor p, g in zip(params, kept): "
             f"p.grad = g{LISTED}", EVERY, IN_SHARDS),
    *silence("own tensors of a step", f"{WARM}\n\nforward(3).backward()\n{FLAT}\n\nclip(0.01, float('inf')); note(flat)"
             "\n\nopt.step()\n\nflat.zero_(); forward(4).backward(); note(flat)\n\nopt.step()", EVERY, IN_SHARDS),
    *silence("own tensors of a step that are let go", f"{WARM}\n\nforward(3).backward()\n\n"
             "kept = [torch.ones_like(p) for p in params]\nfor p, g in zip(params, kept): p.grad = g\n\nopt.step()\n\n"
             "opt.zero_grad()\n\nforward(4).backward(); opt.step()", EVERY),
    *silence("let go before no_sync", f"{WARM}\n\nforward(3).backward()\n{FLAT}\n\nopt.step()\n\n"
             "opt.zero_grad()\n\nwith model.no_sync(): forward(4).backward()\n\nforward(5).backward(); opt.step()",
             EVERY),
    *silence("gradients, zeroed late", f"{WARM}\n\nforward(3).backward(); opt.step()\n\n{KEEP}\n\n"
             "loss = forward(4)\n\nopt.zero_grad()\n\nloss.backward()\n\nnote(kept)\n\nopt.step()", EVERY, IN_SHARDS),
    *silence("plain gradients, zeroed late", f"train(0)\n\nforward(1).backward()\n\n{KEEP}\n\nopt.step()"
             "\n\nattach()\n\nloss = forward(4)\n\nopt.zero_grad()\n\nloss.backward()\n\nnote(kept)\n\nopt.step()",
             EVERY),
    *silence("gradients of a frozen parameter", f"{WARM}\n\nforward(3).backward(); opt.step()\n\n{KEEP}; "
             "params[0].requires_grad_(False)\n\nforward(4).backward()\n\nopt.step()", EVERY,
             True, model="Unused", ddp={"find_unused_parameters": True}),
    *silence("own tensors, and detached", f"{WARM}\n\nkept = [torch.ones_like(p) for p in params]\n"
             "for p, g in zip(params, kept): p.grad = g\n\nforward(3)\n\ndetach()\n\ntrain(4)\n\nnote(kept)"),
    *silence("a gradient that is transposed", f"{WARM}\n\nforward(3).backward()\n\n{KEEP}\n\n"
             "params[2].grad = params[2].grad.t()\n\nnote(kept)\n\nopt.step()", EVERY, IN_SHARDS),
    *silence("own tensors that nobody keeps", f"{WARM}\n\nfor p in params: p.grad = torch.zeros_like(p)\n\ndel p\n\n"
             "forward(3).backward(); opt.step()", EVERY),
    *silence("a list behind no_sync", f"{WARM}\n\nwith model.no_sync(): forward(3).backward()\n\n"
             f"{KEEP}\n\nforward(4).backward()\n\nnote(kept); torch._foreach_mul_(kept, 0.5)\n\nopt.step()", EVERY,
             IN_SHARDS),
    *silence("plain averages, zeroed", f"attach(){PLAIN}\n\ntorch._foreach_zero_(kept)\n\n"
             "forward(4).backward(); opt.step(); torch._foreach_zero_(kept)\n\nforward(5).backward(); opt.step()",
             EVERY, True),
    *silence("plain averages, read", f"attach(){PLAIN}\n\nopt.zero_grad(set_to_none=False){LISTED}", EVERY, IN_SHARDS),
    *silence("plain averages, scaled behind the step", f"attach(){PLAIN}\n\nopt.zero_grad(set_to_none=False)\n\n"
             "forward(4).backward(); opt.step(); torch._foreach_mul_(kept, 0.5)\n\nforward(5).backward(); opt.step()",
             EVERY, True),
]  # fmt: skip


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_what_is_kept_has_the_averages(pool2, case, may_refuse):
    check(pool2, case, may_refuse)


@told
def on_one_rank(rank, world):
    """It waits for gradients at the end of backward() alone: what all ranks decide together stays in step()."""
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, compressor=compress.ACPSGD(rank=2, start_step="warmup"), **training.SMALL)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=50)
    kept = []
    for step in range(4):
        loss = training.loss_of(model, rank, step)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        opt.step()
        schedule.step()
        if rank == 0:
            sum(param.grad.norm().item() for param in model.parameters())
            kept = [param.grad for param in model.parameters()]
        opt.zero_grad(set_to_none=False)
    assert rank > 0 or kept
    engine.detach()


def test_what_one_rank_keeps_does_not_hold_up_the_others(pool2):
    check_told(pool2, on_one_rank)
