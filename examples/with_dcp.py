"""Checkpoints by torch.distributed.checkpoint: torchrun --nproc_per_node=2 examples/with_dcp.py CHECKPOINT"""

import sys

import torch
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear
from dear.integrations.dcp import TrainingState


def build():
    torch.manual_seed(1)
    model = DDP(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, optimizer, dear.attach(model, optimizer, compressor=compress.PowerSGD(rank=4))


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + torch.distributed.get_rank())
        inputs = torch.randn(32, 64, generator=generator)
        loss = torch.nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main(path):
    dear.init_process_group(backend="gloo")
    model, optimizer, engine = build()
    train(model, optimizer, range(20))
    dcp.save({"training": TrainingState(model, optimizer, engine)}, checkpoint_id=path)
    loss = train(model, optimizer, range(20, 40))
    engine.detach()

    model, optimizer, engine = build()  # as another job would, at any number of ranks
    dcp.load({"training": TrainingState(model, optimizer, engine)}, checkpoint_id=path)
    again = train(model, optimizer, range(20, 40))
    engine.detach()
    if torch.distributed.get_rank() == 0:
        print(f"loss {loss:.6f}, resumed loss {again:.6f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
