"""Preconditioners for PyTorch's DistributedDataParallel, with and without the DeAR schedule."""
