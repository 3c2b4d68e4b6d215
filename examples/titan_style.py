"""A loop as torchtitan writes it, with DDP: torchrun --nproc_per_node=2 examples/titan_style.py CHECKPOINTS [BACKEND]

Blocks are checkpointed and compiled one by one; gradients accumulate, and are divided by the number of tokens that all
ranks have seen; torch clips them; Muon has the matrices and AdamW the rest; and each rank saves its part.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
from dear.integrations import dcp_sharded

VOCABULARY, WIDTH, LENGTH, BATCH, MICRO_BATCHES, STEPS, SAVE_EVERY = 64, 32, 16, 16, 2, 30, 10


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.feed_forward = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.feed_forward(self.norms[1](x))


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layers = torch.nn.ModuleDict({str(number): Block() for number in range(2)})
        self.output = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(x)


def parallelize(model, backend):
    """Activation checkpointing, then compilation, then data parallelism."""
    for name, block in model.layers.items():
        model.layers[name] = checkpoint_wrapper(block)
        model.layers[name].compile(backend=backend)
    return DDP(model)


def batches(step):
    """This rank's micro-batches of a step: sequences that count up from somewhere; some tokens do not count."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    for _ in range(MICRO_BATCHES):
        tokens = (torch.arange(LENGTH + 1) + torch.randint(VOCABULARY, (BATCH, 1), generator=generator)) % VOCABULARY
        labels = tokens[:, 1:].masked_fill(torch.rand(BATCH, LENGTH, generator=generator) < 0.1, -100)
        yield tokens[:, :-1], labels


def train_step(model, optimizers, schedulers, step):
    """Returns the loss of all ranks, and the gradients' norm."""
    parts = list(batches(step))
    tokens = torch.tensor(float(sum((labels != -100).sum() for _, labels in parts)))
    dist.all_reduce(tokens)
    total = torch.zeros(())
    for number, (inputs, labels) in enumerate(parts):
        model.require_backward_grad_sync = number == len(parts) - 1
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), reduction="sum")
        (loss * dist.get_world_size() / tokens).backward()  # DDP takes the mean over ranks
        total += loss.detach() / tokens
    dist.all_reduce(total)
    norm = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
        optimizer.step()
        scheduler.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return total.item(), norm.item()


def main(folder, backend="inductor"):
    dear.init_process_group(backend="gloo")
    torch.manual_seed(1)
    model = parallelize(Transformer(), backend)
    matrices = [p for layer in model.module.layers.values() for p in layer.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]
    engine = dear.attach(model, optimizers)  # the one line; it chooses update="owned"
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5)) for optimizer in optimizers
    ]

    whole = sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if os.path.isdir(folder) else []
    first = whole[-1] if whole else 0
    if first:
        dcp_sharded.load(f"{folder}/{first}", model, optimizers, engine)
        for scheduler in schedulers:
            scheduler.last_epoch = first
    for step in range(first, STEPS):
        loss, norm = train_step(model, optimizers, schedulers, step)
        if (step + 1) % SAVE_EVERY == 0:
            dcp_sharded.save(f"{folder}/{step + 1}", model, optimizers, engine)
            if dist.get_rank() == 0:
                print(f"step {step + 1}: loss {loss:.6f}, norm {norm:.6f}")

    engine.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
