"""The network that benchmarks run on: emulated in network namespaces at a chosen rate, or this machine's loopback."""
