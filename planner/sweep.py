"""Speed-ups over tuned 16-bit DDP along bandwidths or numbers of workers, and their picture. Predicted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from . import cluster as clusters
from .batch import Batch
from .cluster import Cluster, ClusterError
from .profile import Profile
from .ranking import BASELINE, rank, ways
from .units import MIB

LABEL = "PREDICTED, not measured"
BANDWIDTHS = ("100Mbit", "500Mbit", "1Gbit", "2.5Gbit", "10Gbit", "25Gbit", "100Gbit")
WORKERS = (2, 4, 8, 16, 32, 64, 128, 256)
SHOWN = ("ddp", BASELINE, "dear", "dear+bf16", "dear+power:4", "dear+acp:4")
CAPS = (4 * MIB, 25 * MIB)


def check_sweep(over: str, cluster: Cluster) -> None:
    """Raises ClusterError where what is swept over would change nothing, or is not the only one that must change."""
    if cluster.collectives or cluster.link is None:
        raise ClusterError(
            "--sweep changes the links, and this cluster has measured collectives, which hold for it alone: describe "
            "its link in their place."
        )
    if over == "workers" and cluster.mixed:
        raise ClusterError(
            "--sweep workers changes how many nodes there are, and device lists one for each: name one by --device, or "
            "sweep over bandwidth."
        )
    if over == "bandwidth" and cluster.nodes == 1 and cluster.inner is not None:
        raise ClusterError(
            "--sweep bandwidth changes the link between nodes, and one node alone has none: sweep over workers, or "
            "describe more nodes."
        )


def sweep(over: str, model: Profile, cluster: Cluster, batch: int) -> dict[str, list[tuple[float, float]]]:
    """Speed-ups over tuned 16-bit DDP, by way: pairs of a bandwidth in bit/s or a number of workers, and it.

    batch: examples of each worker, on average; unequal devices share them out as without a sweep.

    Raises ClusterError where the cluster cannot be swept over so.
    """
    check_sweep(over, cluster)
    assert cluster.link is not None
    if over == "bandwidth":
        points = [(8 * clusters.bytes_a_second(text), clusters.link("1us", text).beta) for text in BANDWIDTHS]
        tried = [
            (at, dataclasses.replace(cluster, link=dataclasses.replace(cluster.link, beta=beta))) for at, beta in points
        ]
    else:
        tried = [
            (float(count), dataclasses.replace(cluster, nodes=count, links=()))
            for count in WORKERS
            if count * cluster.devices_per_node > 1
        ]
    chosen = [way for way in ways() if way.name in SHOWN]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SHOWN}
    for at, other in tried:
        for choice in rank(model, other, chosen, Batch.even(other, batch, 0.0), CAPS):
            found[choice.name].append((at, choice.speedup))
    return found


def draw(swept: dict[str, list[tuple[float, float]]], over: str, model: Profile, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, pairs in swept.items():
        axes.plot(*zip(*pairs, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=10 if over == "bandwidth" else 2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bit/s of a link" if over == "bandwidth" else "nodes")
    axes.set_ylabel(f"speed-up over {BASELINE}")
    axes.set_title(f"{LABEL}: {model.name}")
    axes.grid(alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
