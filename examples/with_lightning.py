"""Lightning's Trainer under the schedule: torchrun --nproc_per_node=2 examples/with_lightning.py"""

import lightning.pytorch as pl
import torch

from dear.integrations.lightning import DearCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))

    def training_step(self, batch, index):
        inputs, targets = batch
        loss = torch.nn.functional.cross_entropy(self.layers(inputs), targets)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main():
    torch.manual_seed(1)
    inputs = torch.randn(1280, 64)
    data = torch.utils.data.TensorDataset(inputs, inputs[:, :10].argmax(1))
    trainer = pl.Trainer(
        strategy="ddp",
        callbacks=[DearCallback()],  # options of dear.attach(): DearCallback(compressor=compress.PowerSGD(rank=8))
        gradient_clip_val=1.0,
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=32))
    if trainer.is_global_zero:
        print(f"loss {trainer.callback_metrics['loss'].item():.3f}")


if __name__ == "__main__":
    main()
