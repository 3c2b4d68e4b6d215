"""Preconditioners for PyTorch's DistributedDataParallel, with and without the DeAR schedule."""

from precondition._plain import register
from precondition.eva import Eva
from precondition.foof import FOOF
from precondition.kfac import DPKFAC, KFAC
from precondition.shampoo import Shampoo

__all__ = ["DPKFAC", "FOOF", "KFAC", "Eva", "Shampoo", "register"]
