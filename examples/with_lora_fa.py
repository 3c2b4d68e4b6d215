"""LoRA-FA of PEFT under the schedule: torchrun --nproc_per_node=2 examples/with_lora_fa.py"""

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import GPT2Config, GPT2LMHeadModel

import dear


def main():
    dear.init_process_group(backend="gloo")
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=48, n_layer=2, n_head=4))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"]))
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-2)
    model = DDP(model)  # after the optimizer was made, which freezes half of the factors
    engine = dear.attach(model, optimizer)  # it updates pairs of factors: update="replicated"

    torch.manual_seed(torch.distributed.get_rank())
    for step in range(200):
        tokens = (torch.arange(16) + torch.randint(64, (16, 1))) % 64  # sequences that count up from somewhere
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 199) and torch.distributed.get_rank() == 0:
            print(f"loss {loss.item():.3f}")

    engine.detach()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
