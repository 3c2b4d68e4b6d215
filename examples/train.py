"""Data-parallel training with the DeAR schedule: torchrun --nproc_per_node=2 examples/train.py"""

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import dear

dear.init_process_group(backend="gloo")  # torchrun, mpirun or srun: whichever started us
torch.manual_seed(1)
model = DDP(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
engine = dear.attach(model, optimizer)  # the one line

torch.manual_seed(torch.distributed.get_rank())  # each rank has examples of its own
for step in range(40):
    inputs = torch.randn(32, 64)
    targets = inputs[:, :10].argmax(1)
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    norm = engine.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 and torch.distributed.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}, gradient norm {norm.item():.3f}")

saved = {"model": model.module.state_dict(), **engine.state_dict()}  # on every rank; write it on one
engine.detach()  # finished parameters, and the optimizer's full state
torch.distributed.destroy_process_group()
