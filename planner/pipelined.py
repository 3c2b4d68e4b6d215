"""A pipeline over a cluster's devices as a way of training, beside the ways that share out the batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dear.cost_model import AlphaBeta

from .batch import Batch
from .cluster import Cluster
from .network import slowest
from .pipeline import Cut, cut
from .profile import Profile
from .ranking import Choice
from .shares import speeds
from .simulate import Step

NAME = "pipeline"
NUMBER = 2  # bytes of an activation that is handed on
KEPT = 16  # bytes of a parameter, its gradient and Adam's two numbers
SMALLEST, LARGEST = 1, 64  # examples of a micro-batch


def pipelined(profile: Profile, cluster: Cluster, batch: Batch, handed: float, baseline: float) -> Choice | None:
    """At its best size of micro-batches, by the cut that :func:`planner.pipeline.cut` finds.

    A step trains on as many examples as that of the other ways, and its optimizer updates as much as a stage has. Where
    there are more workers than layers, the fastest have one each, and the others none. None where no cut is as fast as
    a single device.

    profile: of a worker's average share. handed: numbers of one example that a layer hands to the next. baseline:
    seconds of a step that speed-ups are over.
    """
    chosen = _workers(cluster, len(profile.layers))
    devices = [cluster.devices[index] for index in chosen]
    fast = speeds(devices)
    average = sum(speeds(cluster.devices)) / cluster.workers
    each = batch.examples / cluster.workers
    hops = [AlphaBeta(0.0, 0.0), *(_between(cluster, *pair) for pair in pairwise(chosen))]
    slow = cluster.machine().slowest(len(chosen))
    best: tuple[float, int, Cut] | None = None
    size = SMALLEST
    while size <= min(LARGEST, batch.examples):
        work = [slow * average * (layer.forward + layer.backward) * size / each for layer in profile.layers]
        found = cut(work, fast, [hop.seconds(NUMBER * handed * size) for hop in hops])
        seconds = batch.examples / found.rate(size, -(-batch.examples // size))
        seconds *= -(-batch.examples // size) * size / batch.examples  # the last micro-batch may be smaller
        if best is None or seconds < best[0]:
            best = seconds, size, found
        size *= 2
    assert best is not None
    seconds, size, found = best
    memory = _memory(profile, found, size * batch.activations)
    seconds += profile.update * max(memory[1]) / profile.elements
    fits = all(need <= device.memory for need, device in zip(memory[0], devices, strict=True))
    stages = sum(start < end for start, end in pairwise((0, *found.ends)))
    if stages < 2:
        return None
    code = f"torch.distributed.pipelining: {stages} stages, {-(-batch.examples // size)} micro-batches of {size}"
    exposed = seconds - profile.compute
    sent = 2.0 * NUMBER * handed * batch.examples
    return Choice(
        NAME, Step(seconds, exposed, sent, 0), None, baseline / seconds, max(memory[0]), fits, True, code,
        batch.examples / seconds,
    )  # fmt: skip


def _workers(cluster: Cluster, most: int) -> list[int]:
    """Those that have a stage: the fastest, in their order in the cluster."""
    fast = speeds(cluster.devices)
    ranked = sorted(range(cluster.workers), key=lambda index: -fast[index])
    return sorted(ranked[:most])


def _between(cluster: Cluster, one: int, other: int) -> AlphaBeta:
    """The link between two workers: inside a node, or the slower one of two nodes."""
    nodes = one // cluster.devices_per_node, other // cluster.devices_per_node
    if nodes[0] == nodes[1] and cluster.inner is not None:
        return cluster.inner
    assert cluster.link is not None
    return slowest([cluster.links[node] for node in nodes]) if cluster.links else cluster.link


def _memory(profile: Profile, found: Cut, activations: float) -> tuple[list[float], list[int]]:
    """Bytes of each stage, which keeps as many micro-batches as there are stages behind it, and one; and its elements.

    activations: bytes of a micro-batch over all layers, of which each layer has its part by computing.
    """
    whole = profile.forward + profile.backward
    bounds: Sequence[tuple[int, int]] = list(pairwise((0, *found.ends)))
    needs, elements = [], []
    for number, (start, end) in enumerate(bounds):
        own = profile.layers[start:end]
        elements.append(sum(layer.elements for layer in own))
        part = sum(layer.forward + layer.backward for layer in own) / whole if whole else 0.0
        needs.append(KEPT * elements[-1] + (len(bounds) - number) * part * activations)
    return needs, elements
