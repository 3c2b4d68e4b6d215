"""Preconditioners for PyTorch's DistributedDataParallel, with and without the DeAR schedule."""

from precondition._plain import register

__all__ = ["register"]
