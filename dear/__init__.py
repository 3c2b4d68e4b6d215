"""Decoupled all-reduce for PyTorch's DistributedDataParallel: reduce-scatter under backward, all-gather under forward."""
