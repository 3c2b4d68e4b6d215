"""FSDP2 over this library's connections: torchrun --nproc_per_node=2 examples/with_fsdp2.py"""

import torch
from torch.distributed.fsdp import fully_shard

import dear
from dear.integrations import fsdp2


def main():
    dear.init_process_group(backend="gloo")
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    # Leave the options out, and training is FSDP's own, bit for bit with two ranks.
    wire = fsdp2.use(model, wire=torch.bfloat16, error_feedback=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(40):
        inputs = torch.randn(32, 64)
        loss = torch.nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    kept = wire.state_dict()  # each rank's own: save it with its shards
    if torch.distributed.get_rank() == 0:
        print(f"loss {loss.item():.3f}; error feedback of {len(kept['errors'])} modules")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
