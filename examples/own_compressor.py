"""A compressor of your own, under the DeAR schedule: torchrun --nproc_per_node=2 examples/own_compressor.py"""

# --8<-- [start:compressor]
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear


class RandomK(compress.Compressor):
    """Sends the same random elements on every rank: their values can be summed, their indices need not be sent."""

    def __init__(self, density, **options):
        super().__init__(**options)
        self.density = density

    def options(self):
        return {"density": self.density}

    def ratio(self, group):
        return group.numel / self._count(group)

    def encode(self, group):
        corrected = self.corrected(group)  # gradient plus error feedback; it is the error feedback's own memory
        chosen = self._chosen(group)
        payload = corrected[chosen]
        corrected[chosen] = 0  # so what remains there is what was not sent
        return payload

    def decode(self, group, payload):
        group.gradient.zero_()
        group.gradient[self._chosen(group)] = payload.to(group.gradient.dtype)

    def _count(self, group):
        return max(1, int(self.density * group.numel))

    def _chosen(self, group):
        generator = self.generator(f"{group.step} {group.names}")  # the same on every rank
        return torch.randperm(group.numel, generator=generator)[: self._count(group)].to(group.device)


# --8<-- [end:compressor]


# --8<-- [start:training]
def main():
    dear.init_process_group(backend="gloo")
    torch.manual_seed(1)
    model = DDP(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dear.attach(model, optimizer, compressor=RandomK(density=0.1))

    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(60):
        inputs = torch.randn(32, 64)
        loss = torch.nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    numbers = engine.compressor.stats()
    engine.detach()
    if torch.distributed.get_rank() == 0:
        print(f"loss {loss.item():.3f}; sent {numbers['bytes_sent'] / numbers['dense_bytes']:.2f} of a dense step")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
# --8<-- [end:training]
