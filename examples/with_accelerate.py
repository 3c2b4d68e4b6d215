"""Accelerate's loop under the schedule: torchrun --nproc_per_node=2 examples/with_accelerate.py"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dear.integrations.accelerate import attach


def main():
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    inputs = torch.randn(1280, 64)
    data = torch.utils.data.TensorDataset(inputs, inputs[:, :10].argmax(1))
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(data, batch_size=32)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    engine = attach(accelerator, model, optimizer)  # the one line; options of dear.attach() may follow

    for _ in range(3):
        for batch, targets in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(batch), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        (folder,) = broadcast_object_list([folder])  # rank 0's
        accelerator.save_state(folder)  # the optimizer's full state, and what compressors have kept
        accelerator.wait_for_everyone()
        accelerator.load_state(folder)
        accelerator.wait_for_everyone()
    engine.detach()
    accelerator.print(f"loss {loss.item():.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
