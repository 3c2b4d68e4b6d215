"""Two nodes of two workers on an emulated network: what goes through a node's port, counted by the kernel."""

import re
from pathlib import Path

import compressing
import pytest
import torch
import torch.distributed as dist
from compressing import gradients
from test_network import needs_lab

import compress
import dear
from benchmarks.network.nodes import NodesLab

SHAPES = {"matrix": (600, 500), "vector": (300_000,)}
STEPS = {"topk": 4, "sign": 24, "dense": 4}  # what TCP sends again on a busy machine is little beside as many bytes


def sent_by_node() -> int:
    """Bytes of payload and headers that the port of this process's namespace has sent."""
    (line,) = re.findall(r"eth0:(.*)", Path("/proc/self/net/dev").read_text())
    return int(line.split()[8])


def sent_again() -> int:
    """Segments that this process's namespace has sent another time, for the message of a failure."""
    names, values = (line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines() if "Tcp:" in line)
    return int(values[names.index("RetransSegs")])


def bytes_of_a_step(rank, kind, hierarchy):
    model = torch.nn.parallel.DistributedDataParallel(compressing.Prescribed(SHAPES), bucket_cap_mb=100)
    if kind == "dense":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = dear.attach(model, optimizer, hierarchy=hierarchy)
    else:
        compressor = compress.SignSGD() if kind == "sign" else compress.TopK(density=0.1)
        compress.register(model, compressor, hierarchy=hierarchy)

    def step(index):
        model(gradients(rank, index, SHAPES)).backward()
        if kind == "dense":
            optimizer.step()
            engine.synchronize()
        model.zero_grad()

    for index in range(3):  # DDP has laid its buckets, and the lanes are connected
        step(index)
    dist.barrier()
    before = sent_by_node()
    for index in range(3, 3 + STEPS[kind]):
        step(index)
    dist.barrier()
    return (sent_by_node() - before) / STEPS[kind]


def bytes_by_kind(rank, world):
    dear.init_process_group("gloo")
    counted = {kind: [bytes_of_a_step(rank, kind, each) for each in (None, "node")] for kind in STEPS}
    return counted | {"segments sent again": sent_again()}


@needs_lab
@pytest.mark.slow
@pytest.mark.parametrize("rate", ["100mbit", "1gbit"])
def test_a_nodes_port_carries_half_of_what_one_level_sends(rate):
    numel = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    with NodesLab(2, 2, rate) as lab:
        counted = lab.call(bytes_by_kind, timeout=300)[0]
    for kind in ("topk", "sign"):
        flat, two = counted[kind]
        assert 0.4 * flat < two < 0.6 * flat, counted
    flat, two = counted["dense"]
    # A ring of four in one level already crosses the port once: 3/4 of the bytes each way, against 1/2.
    assert 0.6 * flat < two < 0.75 * flat, counted
    assert 4 * numel < two < 1.1 * 4 * numel, "each element once for each half, and headers"
