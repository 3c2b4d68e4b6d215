"""Preconditioners for PyTorch's DistributedDataParallel, with and without the DeAR schedule."""

from precondition._plain import register
from precondition.kfac import DPKFAC, KFAC

__all__ = ["DPKFAC", "KFAC", "register"]
