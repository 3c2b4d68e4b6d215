"""Transformers' Trainer under the schedule: torchrun --nproc_per_node=2 examples/with_transformers.py"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from dear.integrations.transformers import attach


class Counting(torch.utils.data.Dataset):
    """Sequences that count up from somewhere."""

    def __len__(self):
        return 640

    def __getitem__(self, index):
        tokens = (torch.arange(16) + index) % 64
        return {"input_ids": tokens, "labels": tokens}


def main():
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=48, n_layer=2, n_head=4))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            max_grad_norm=1.0,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Counting())
        attach(trainer)  # the one line; options of dear.attach() may follow
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if trainer.is_world_process_zero():
        print(f"loss {losses[0]:.3f}, then loss {losses[-1]:.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
