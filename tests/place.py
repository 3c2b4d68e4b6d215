"""Where a test's tensors live: on the GPU if its process group is NCCL's (see test_cuda.py), else on the host."""

import torch
import torch.distributed as dist


def place() -> torch.device:
    """The device of the default process group's tensors."""
    over_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if over_nccl else torch.device("cpu")
