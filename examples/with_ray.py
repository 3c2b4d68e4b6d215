"""Ray Train under the schedule, with two workers on this machine: python examples/with_ray.py"""

import tempfile

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

import dear


def train():
    """One worker. Ray has made the process group."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    model = prepare_model(model)  # DDP
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(rank)
    with dear.attach(model, optimizer) as engine:  # the one line
        for _ in range(40):
            inputs = torch.randn(32, 64)
            loss = torch.nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = {"model": model.module.state_dict(), **engine.state_dict()}  # on every rank
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            torch.save(state, f"{folder}/state.pt")
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"loss": loss.item()}, checkpoint=checkpoint)


def main():
    ray.init(num_cpus=4, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            train,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=False),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        result = trainer.fit()
    print(f"loss {result.metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
