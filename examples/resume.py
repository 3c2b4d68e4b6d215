"""Training that goes on when a worker dies.

torchrun --nproc_per_node=2 --max-restarts=2 examples/resume.py checkpoint.pt
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import dear

STEPS, SAVE_EVERY = 40, 5


def loss_of(model, step):
    """The loss on this rank's batch of this step, which is the same whenever it is computed."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    inputs = torch.randn(32, 64, generator=generator)
    return torch.nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))


def save(path, step, model, engine):
    state = {"step": step, "model": model.module.state_dict(), **engine.state_dict()}  # every rank
    if dist.get_rank() == 0:
        torch.save(state, path + ".new")
        os.replace(path + ".new", path)  # at once: who dies while writing does not harm the last one


def main(path):
    dear.init_process_group(backend="gloo")  # under torchrun, each start of the workers has keys of its own
    torch.manual_seed(1)
    model = DDP(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    engine = dear.attach(model, optimizer)

    first = 0
    if os.path.exists(path):
        state = torch.load(path, weights_only=False)
        model.module.load_state_dict(state["model"])
        engine.load_state_dict(state)
        first = state["step"]

    for step in range(first, STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            save(path, step + 1, model, engine)

    engine.detach()
    if dist.get_rank() == 0:
        print(f"started at step {first}, loss {loss_of(model.module, STEPS).item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
