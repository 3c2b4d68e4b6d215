"""Gradient compressors for PyTorch's DistributedDataParallel, with and without the DeAR schedule."""

from compress.acp_sgd import ACPSGD
from compress.automatic import auto
from compress.comm_hook import comm_hook, register
from compress.compressor import Compressor
from compress.dense import Dense
from compress.group import Group
from compress.local_power_sgd import LocalPowerSGD
from compress.power_sgd import PowerSGD
from compress.presets import preset
from compress.sign_sgd import SignSGD
from compress.top_k import TopK

__all__ = [
    "ACPSGD",
    "Compressor",
    "Dense",
    "Group",
    "LocalPowerSGD",
    "PowerSGD",
    "SignSGD",
    "TopK",
    "auto",
    "comm_hook",
    "preset",
    "register",
]
