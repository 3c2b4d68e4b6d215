"""python -m dear plan: a ranked table of ways of training, a sweep as a picture, or JSON. Everything is predicted."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import cluster as clusters
from .. import models, profile
from ..batch import Batch
from ..cluster import Cluster, ClusterError
from ..devices import device
from ..failures import Failures
from ..pipelined import pipelined
from ..ranking import BASELINE, Choice, in_order, rank, ways
from ..sweep import LABEL, check_sweep, draw, sweep
from ..timeline import check_picture
from ..units import GIB
from ..user_model import imported
from ..writing import HERE, check_json, check_writable, json_option, write_json


def options(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(models.MODELS)
    parser.add_argument("--model", required=True, help=f"one of {known}; MODULE:CALLABLE; or a profile (.json)")
    parser.add_argument(
        "--cluster", type=Path, help="a YAML file of your own or of probe, or JSON of benchmarks.collectives"
    )
    parser.add_argument("--cell", type=int, help="of a file of the collectives benchmark that has several, from 1")
    parser.add_argument("--workers", type=int, help="in place of a file: so many nodes of one device")
    parser.add_argument("--bandwidth", help="of a node's link, such as 10Gbit")
    parser.add_argument("--latency", help="of a link (30us)")
    parser.add_argument("--device", help="such as a100 (which it is by default)")
    parser.add_argument("--batch", type=int, default=32, help="examples of one worker and step (32)")
    parser.add_argument(
        "--input", action="append", default=[], metavar="SHAPE",
        help="of one example, such as 3x224x224 or 128:int64: counts activations of MODULE:CALLABLE; again for each",
    )  # fmt: skip
    parser.add_argument("--handed", type=float, help="numbers that a layer hands on for one example, for a pipeline")
    parser.add_argument("--step-ms", type=float, help="forward and backward of one worker by itself, if you know it")
    parser.add_argument("--compressors", default="bf16,power:4,power:8,acp:4,topk:0.01,sign", help="to compare")
    parser.add_argument("--sweep", choices=("bandwidth", "workers"), help="speed-ups over it, as a picture")
    parser.add_argument("--picture", type=Path, default=Path("out/sweep.png"), help="where the sweep's goes")
    json_option(parser, "everything")


def run(given: argparse.Namespace) -> None:
    check_json(given.json)
    cluster = _cluster(given)
    if given.sweep:
        check_writable("--picture", given.picture)
        check_picture(given.picture)
        check_sweep(given.sweep, cluster)
    model, activations, handed = _profile(given, cluster)
    batch = Batch.even(cluster, given.batch, activations)
    console = Console() if Console().is_terminal else Console(width=170)
    console.quiet = given.json == HERE
    chosen = ways([name.strip() for name in given.compressors.split(",") if name.strip()])
    found = rank(model, cluster, chosen, batch)
    if given.handed and cluster.link is None:
        raise ClusterError("--handed is for a pipeline, and this cluster has measured collectives alone: add its link.")
    if handed and cluster.link is not None:
        cut = pipelined(model, cluster, batch, handed, found[0].speedup * found[0].step.seconds)
        found = in_order([*found, *([cut] if cut else [])])
    console.print(_table(model, cluster, found, counted=activations > 0))
    console.print(
        f"Speed-ups are over DDP with torch's 16-bit hook at its best bucket size. Computing takes "
        f"{1e3 * model.compute:.4g} ms. Ways in italics lose something of each gradient: see Compression and loss.",
        highlight=False,
    )
    if not activations:
        console.print(f"Activations are not counted: {_counts_activations(given)}.", highlight=False)
    if not any(choice.fits for choice in found):
        least = min(choice.memory for choice in found) / GIB
        console.print(
            f"No way fits: the least needs {least:.1f} GiB of a device, and {cluster.device.name} has "
            f"{cluster.device.memory / GIB:.4g}. Every rank holds the whole model here: take larger devices, a "
            "pipeline, or FSDP.",
            highlight=False,
        )
    payload = {
        "label": LABEL,
        "model": model.name,
        "workers": cluster.workers,
        "compute_seconds": model.compute,
        "batch_by_worker": batch.shares,
        "activation_bytes_by_example": activations or None,
        "choices": [dataclasses.asdict(choice) for choice in found],
    }
    if cluster.mixed:
        console.print(f"{_shares(cluster, batch)}", highlight=False)
    if cluster.failures is not None:
        console.print(_expected(cluster.failures, cluster.workers, found[0]), highlight=False)
        payload["failures"] = {
            **dataclasses.asdict(cluster.failures),
            "checkpoint_every": cluster.failures.interval(cluster.workers),
            "waits": cluster.failures.waits(cluster.workers),
            "useful": cluster.failures.useful(cluster.workers),
        }
    if given.sweep:
        swept = sweep(given.sweep, model, cluster, given.batch)
        draw(swept, given.sweep, model, given.picture)
        payload["sweep"] = {"over": given.sweep, "speedups": swept}
        console.print(f"{LABEL}: the sweep over {given.sweep} is in {given.picture}.", highlight=False)
    write_json(given.json, payload)


def _cluster(given: argparse.Namespace) -> Cluster:
    if given.cluster is not None:
        if (given.workers, given.bandwidth, given.latency) != (None, None, None):
            raise ClusterError("--cluster says it all: leave --workers, --bandwidth and --latency out.")
        found = clusters.read(given.cluster, given.cell)
        return dataclasses.replace(found, device=device(given.device), mixed=()) if given.device else found
    if given.cell is not None:
        raise ClusterError("--cell is of a file that the collectives benchmark wrote: name it by --cluster.")
    if given.workers is None or given.bandwidth is None:
        raise ClusterError("Nothing says what the cluster is: give --cluster, or --workers and --bandwidth.")
    link = clusters.link(given.latency or "30us", given.bandwidth)
    return Cluster(given.workers, device=device(given.device or "a100"), link=link)


def _profile(given: argparse.Namespace, cluster: Cluster) -> tuple[profile.Profile, float, float]:
    """And, of one example, the bytes of activations that are kept, and the numbers that a layer hands on, 0 where that
    is not known."""
    if given.batch < 1 or (given.step_ms is not None and not 0 < given.step_ms < math.inf):
        raise ValueError("--batch and --step-ms must be above 0, and finite.")
    handed = given.handed or 0.0
    if not 0 <= handed < math.inf:
        raise ValueError("--handed must be 0 or more, and finite.")
    if given.input and (given.model.endswith(".json") or ":" not in given.model):
        raise ValueError("--input is of a model of your own, as MODULE:CALLABLE: leave it out.")
    if given.model.endswith(".json"):
        if given.step_ms is not None:
            raise ValueError("--step-ms is what a profile says by itself: leave it out.")
        return profile.read(Path(given.model)), 0.0, handed
    own = ":" in given.model
    model = imported(given.model, given.input, given.batch) if own else models.built_in(given.model)
    if given.step_ms is not None:
        compute = given.step_ms / 1e3
    elif own:  # whose blocks have numbers of parameters for operations
        raise ValueError(f"How long {given.model} computes is not known: give --step-ms.")
    else:
        each = (1 + models.BACKWARD) * model.operations / (cluster.device.operations * cluster.device.sustained)
        compute = given.batch * each
    update = model.parameters * models.UPDATE_BYTES / cluster.device.bandwidth
    return model.profile(compute, update), model.activations, handed or model.handed


def _counts_activations(given: argparse.Namespace) -> str:
    if ":" in given.model:
        return "give the shape of one example as --input to count them"
    return "leave them their room, or name the model as MODULE:CALLABLE with --input"


def _table(model: profile.Profile, cluster: Cluster, found: Sequence[Choice], counted: bool) -> Table:
    """counted: activations are, in the memory."""
    title = (
        f"{LABEL} · {model.name}, {model.elements / 1e6:.4g} M parameters · {cluster.workers} × {cluster.device.name}"
    )
    made = Table(title=title)
    memory = "GiB" if counted else "GiB, activations not counted"
    for name in ("way", "step ms", f"× {BASELINE}", "exposed ms", "examples/s", memory, "the line of code"):
        made.add_column(name, justify="left" if name in ("way", "the line of code") else "right", no_wrap=name == "way")
    for each in found:
        memory = f"{each.memory / GIB:.1f}" + ("" if each.fits else ", does not fit")
        step, exposed = f"{1e3 * each.step.seconds:.1f}", f"{1e3 * each.step.exposed:.1f}"
        style = "" if each.exact else "italic"
        made.add_row(
            each.name, step, f"{each.speedup:.2f}", exposed, f"{each.rate:.4g}", memory, each.code.replace("[", r"\["),
            style=style,
        )  # fmt: skip
    return made


def _shares(cluster: Cluster, batch: Batch) -> str:
    """Of nodes that are alike, once."""
    first = batch.shares[:: cluster.devices_per_node]
    own = list(dict.fromkeys((device.name, share) for device, share in zip(cluster.mixed, first, strict=True)))
    each = ", ".join(f"{share} on {name}" for name, share in own)
    return (
        f"A worker's share of the {batch.examples} examples of a step: {each}. Scale each worker's loss by its share "
        f"times {cluster.workers} / {batch.examples}, since gradients are averaged by worker. A pipeline has no shares."
    )


def _expected(failures: Failures, workers: int, best: Choice) -> str:
    every, useful = failures.interval(workers), failures.useful(workers)
    return (
        f"With a failure of a worker every {failures.mtbf / 3600:.4g} hours, {failures.spares} spare, and a checkpoint "
        f"every {every / 60:.3g} minutes, {useful:.1%} of the time counts: {best.name} trains {useful * best.rate:.4g} "
        f"examples/s in expectation. For {failures.waits(workers):.1%} of the time it waits for a spare."
    )
