"""A cluster: devices and the links between them, from a YAML file, from options, or as measured.

nodes: 8
devices_per_node: 4
device: a100                      # or {name: mine, tflops: 50, memory_gib: 16, bandwidth_gb: 600}; or a list, by node
link: {latency: 30us, bandwidth: 10Gbit}        # of a node; a list, where they differ: the slowest counts
inner: {latency: 5us, bandwidth: 600Gbit}       # between devices of a node; without it the network is flat
algorithm: ring                   # or tree
collectives:                      # measured, in seconds and seconds per byte; then links are a pipeline's alone
  all_reduce: {alpha: 1.0e-3, beta: 1.0e-9}
measured_workers: 32              # among whom the collectives were measured; of no others do they say anything
compressors:                      # measured, in seconds per byte of gradient, by name; others by memory bandwidth
  bf16: {encode: 1.0e-10, merge: 2.0e-10, decode: 1.0e-10}
host: {cores: 1.0, exchange_cpu: 3.0e-10}       # where gradients are host tensors: a worker's cores, seconds of a core
                                  # for each byte that it sends, and hook: 0.1ms that each bucket costs
straggler: 1.1                    # how many times as long the slowest device computes
jitter: 0.02                      # standard deviation of computing, as a share of it
failures: {mtbf: 30d, spares: 2}  # and checkpoint: 30s, restart: 5min, repair: 1d, every: 20min; planner/failures.py
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dear.cost_model import AlphaBeta

from . import collectives_file
from .codecs import Cost, codec
from .devices import Device, device
from .failures import Failures
from .machine import Host, Machine
from .network import ALGORITHMS, PHASES, Network, flat, measured, slowest, two_level
from .reading import parsed
from .shares import typical
from .units import GIB

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_LONG = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
MOST = 1 << 20  # workers
LONGEST = 60.0  # seconds: more is no latency
KEYS = (
    "nodes", "devices_per_node", "device", "link", "inner", "algorithm", "collectives", "compressors", "straggler",
    "jitter", "label", "failures", "measured_workers", "host",
)  # fmt: skip


class ClusterError(ValueError):
    """A description that contradicts itself or cannot be; the message says which entry and what to do."""


@dataclass(frozen=True)
class Cluster:
    """nodes: with ``devices_per_node`` workers each. collectives: measured lines by phase, in place of the links.
    compressors: measured costs by name, in place of those by the device's memory bandwidth. device: of every node, or
    what stands for ``mixed`` ones. mixed, links: by node, where they differ; ``link`` is the slowest. inner: between
    devices of a node, where ``link`` is between nodes. measured_workers: among whom the collectives were measured, None
    where nobody says. host: None where exchanges take no core of those who compute."""

    nodes: int
    devices_per_node: int = 1
    device: Device = field(default_factory=lambda: device("a100"))
    link: AlphaBeta | None = None
    inner: AlphaBeta | None = None
    algorithm: str = "ring"
    collectives: Mapping[str, AlphaBeta] = field(default_factory=dict)
    compressors: Mapping[str, Cost] = field(default_factory=dict)
    straggler: float = 1.0
    jitter: float = 0.0
    mixed: tuple[Device, ...] = ()
    links: tuple[AlphaBeta, ...] = ()
    failures: Failures | None = None
    measured_workers: int | None = None
    host: Host | None = None

    def __post_init__(self) -> None:
        if self.workers < 2:
            raise ClusterError(f"nodes times devices_per_node is {self.workers}: a cluster has 2 workers or more.")
        if self.workers > MOST:
            raise ClusterError(f"nodes times devices_per_node is {self.workers}: no more than {MOST} are predicted.")
        if self.link is None and not self.collectives:
            raise ClusterError("link is missing: give its latency and bandwidth, or measured collectives.")
        if self.inner is not None and self.devices_per_node < 2:
            raise ClusterError(
                "inner is between devices of a node, which has one: leave it out, or set devices_per_node."
            )
        if self.inner is not None and self.link is None:
            raise ClusterError("inner is given, and link, between nodes, is not: give both, or leave inner out.")
        if self.mixed and len(self.mixed) != self.nodes:
            raise ClusterError(f"device lists {len(self.mixed)} entries for {self.nodes} nodes: list one for each.")
        if self.collectives and self.measured_workers not in (None, self.workers):
            raise ClusterError(self._other_workers())
        if self.algorithm not in ALGORITHMS:
            raise ClusterError(f"algorithm must be one of {', '.join(ALGORITHMS)}, not {self.algorithm!r}.")
        if self.straggler < 1 or not 0 <= self.jitter < 1:
            raise ClusterError("straggler must be 1 or more, and jitter from 0 to 1.")

    @property
    def workers(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def devices(self) -> tuple[Device, ...]:
        """By worker."""
        return tuple(one for one in self.mixed or (self.device,) * self.nodes for _ in range(self.devices_per_node))

    def network(self) -> Network:
        if self.collectives:
            return measured(self.workers, self.collectives)
        assert self.link is not None
        if self.inner is not None and self.devices_per_node > 1:
            return two_level(self.inner, self.devices_per_node, self.link, self.nodes, self.algorithm)
        return flat(self.link, self.workers, self.algorithm)

    def machine(self) -> Machine:
        costs = {**self.device.costs(), **self.compressors}
        made = Machine(costs=costs, straggler=self.straggler, jitter=self.jitter)
        if self.host is None:
            return made
        return replace(made, **asdict(self.host), synchronous=True)  # FSDP2's collectives are gloo's then

    def _other_workers(self) -> str:
        """Why measured collectives say nothing here, and the link that would explain them."""
        assert self.measured_workers is not None
        others = self.measured_workers - 1
        half = measured(self.measured_workers, self.collectives).phases["reduce_scatter"][0].line
        remedy = ""
        if half.beta > 0:
            bits = 8 * others / (half.beta * self.measured_workers)
            remedy = (
                ", or put link: {latency: "
                f"{1e6 * half.alpha / others:.1f}us, bandwidth: {bits / 1e6:.1f}Mbit}} in place of collectives, to "
                "which they come on a ring"
            )
        return (
            f"nodes times devices_per_node is {self.workers}, and the collectives were measured among "
            f"{self.measured_workers} workers: probe {self.workers}{remedy}."
        )


def seconds(text: str) -> float:
    """Of 30us. Raises ClusterError."""
    found = re.fullmatch(r"(\d+\.?\d*(?:e-?\d+)?)\s*(ns|us|ms|s)", str(text).strip().lower())
    if found is None:
        raise ClusterError(f"{text!r} is not a latency: write it like 30us or 0.5ms.")
    latency = float(found[1]) * _SECONDS[found[2]]
    if latency > LONGEST:
        raise ClusterError(f"A latency of {text} is that of no network: check the unit.")
    return latency


def bytes_a_second(text: str) -> float:
    """Of 10Gbit. Raises ClusterError."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([kmgt])bit(/s)?", str(text).strip().lower())
    if found is None or float(found[1]) <= 0:
        raise ClusterError(f"{text!r} is not a bandwidth: write it like 500Mbit or 10Gbit.")
    return float(found[1]) * _BITS[found[2]] / 8


def link(latency: str, bandwidth: str) -> AlphaBeta:
    return AlphaBeta(seconds(latency), 1 / bytes_a_second(bandwidth))


def read(path: Path, cell: int | None = None) -> Cluster:
    """Of a YAML file, or of what the collectives benchmark wrote: then cell is which of its cells, if it has several.

    Raises ClusterError, of one sentence that names the file.
    """
    try:
        found = parsed(path.read_text(), is_json=path.suffix == ".json")
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ClusterError(f"{path} cannot be read as a cluster ({why}): see python -m dear plan --help.") from error
    try:
        if collectives_file.is_one(found):
            found = collectives_file.description(found, cell)
        elif cell is not None:
            raise ValueError("cells are of a file that the collectives benchmark wrote: leave --cell out.")
        return described(found)
    except ValueError as error:
        raise ClusterError(f"{path}: {error}") from None


def described(found: Any) -> Cluster:
    """The cluster that a mapping describes. Raises ClusterError."""
    if not isinstance(found, dict):
        raise ClusterError(f"A cluster is a mapping with entries such as nodes and link, not {type(found).__name__}.")
    unknown = [key for key in found if key not in KEYS]
    if unknown:
        raise ClusterError(f"{unknown[0]!r} is no entry of a cluster: known are {', '.join(KEYS)}.")
    given: dict[str, Any] = {
        key: _number(found, key, whole=True, least=least)
        for key, least in (("nodes", 1), ("devices_per_node", 1), ("measured_workers", 2))
        if key in found
    }
    if "nodes" not in given:
        raise ClusterError("nodes is missing: say how many there are.")
    given |= {key: _number(found, key) for key in ("straggler", "jitter") if key in found}
    if "algorithm" in found:
        given["algorithm"] = found["algorithm"]
    if "device" in found:
        devices = [_device(entry) for entry in _by_node(found, "device")]
        given |= {"device": typical(devices), "mixed": tuple(devices) if len(devices) > 1 else ()}
    for key in ("link", "inner"):
        if key in found:
            links = [_link(entry, key) for entry in _by_node(found, key)]
            given[key] = slowest(links)
            if key == "link" and len(links) > 1:
                given["links"] = tuple(links)
    if "collectives" in found:
        if "algorithm" in found:
            raise ClusterError("algorithm is of links, and collectives were measured with theirs: leave algorithm out.")
        given["collectives"] = _lines(found["collectives"])
    if "compressors" in found:
        given["compressors"] = _costs(found["compressors"])
    if "host" in found:
        given["host"] = _host(found["host"])
    if "failures" in found:
        given["failures"] = _failures(found["failures"])
    return Cluster(**given)


def _by_node(found: Mapping[str, Any], key: str) -> list[Any]:
    """The entries of a list, one for each node; or the one that counts for all."""
    if not isinstance(found[key], list):
        return [found[key]]
    if len(found[key]) not in (1, found["nodes"]):
        raise ClusterError(f"{key} lists {len(found[key])} entries for {found['nodes']} nodes: list one for each.")
    return found[key]


def _number(found: Mapping[str, Any], key: str, whole: bool = False, least: int = 1) -> float:
    """least: that a whole one may be."""
    value = found[key]
    if isinstance(value, str) and not whole:  # YAML takes 1e-3 for text
        with contextlib.suppress(ValueError):
            value = float(value)
    kind: Any = int if whole else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value < math.inf or (whole and value < least):
        raise ClusterError(f"{key} must be a {'whole ' if whole else ''}number, not {value!r}.")
    return value  # type: ignore[no-any-return]


def _link(entry: Any, key: str) -> AlphaBeta:
    if not isinstance(entry, dict) or set(entry) != {"latency", "bandwidth"}:
        raise ClusterError(f"{key} must have a latency and a bandwidth, and has {entry!r}.")
    return link(entry["latency"], entry["bandwidth"])


def _lines(entry: Any) -> dict[str, AlphaBeta]:
    if not isinstance(entry, dict) or not entry or not set(entry) <= set(PHASES):
        raise ClusterError(f"collectives must name some of {', '.join(PHASES)}.")
    lines = {}
    for phase, line in entry.items():
        if not isinstance(line, dict) or set(line) != {"alpha", "beta"}:
            raise ClusterError(f"collectives: {phase} must have alpha and beta, in seconds and seconds per byte.")
        lines[phase] = AlphaBeta(_number(line, "alpha"), _number(line, "beta"))
        if lines[phase].beta > 1e-3 or lines[phase].alpha > LONGEST or lines[phase] == AlphaBeta(0, 0):
            raise ClusterError(f"collectives: {phase} takes {lines[phase]}, which no network does: check the units.")
    if "all_reduce" not in lines and not {"reduce_scatter", "all_gather"} <= set(lines):
        raise ClusterError("collectives must have all_reduce, or both reduce_scatter and all_gather.")
    return lines


def _costs(entry: Any) -> dict[str, Cost]:
    if not isinstance(entry, dict):
        raise ClusterError(f"compressors must be a mapping from names to costs, not {entry!r}.")
    made = {}
    for name, cost in entry.items():
        try:
            codec(str(name))
        except ValueError as error:
            raise ClusterError(f"compressors: {str(error)[:1].lower()}{str(error)[1:]}") from None
        if not isinstance(cost, dict) or set(cost) != {"encode", "merge", "decode"}:
            raise ClusterError(f"compressors: {name} must have encode, merge and decode, in seconds per byte.")
        made[str(name)] = Cost(*(_number(cost, stage) for stage in ("encode", "merge", "decode")))
        if max(made[str(name)].encode, made[str(name)].merge, made[str(name)].decode) > 1e-3:
            raise ClusterError(f"compressors: {name} takes {made[str(name)]}, which no machine does: check the units.")
    return made


def _host(entry: Any) -> Host:
    if not isinstance(entry, dict) or not {"cores", "exchange_cpu"} <= set(entry) <= {"cores", "exchange_cpu", "hook"}:
        raise ClusterError(f"host must have cores and exchange_cpu, and may have a hook; it has {entry!r}.")
    hook = {"hook": seconds(entry["hook"])} if "hook" in entry else {}
    made = Host(_number(entry, "cores"), _number(entry, "exchange_cpu"), **hook)
    if not made.cores or made.exchange_cpu > 1e-3:
        raise ClusterError(f"host is {made}, which no machine is: cores are above 0, exchange_cpu is seconds per byte.")
    return made


def _failures(entry: Any) -> Failures:
    known = [field.name for field in fields(Failures)]
    if not isinstance(entry, dict) or "mtbf" not in entry or not set(entry) <= set(known):
        raise ClusterError(f"failures must have an mtbf, and may have {', '.join(known[1:])}; it has {entry!r}.")
    times: dict[str, Any] = {key: _long(f"failures: {key}", entry[key]) for key in entry if key != "spares"}
    spares = _number(entry, "spares", whole=True, least=0) if "spares" in entry else 0
    try:
        return Failures(**times, spares=int(spares))
    except ValueError as error:
        raise ClusterError(f"failures: {error}") from None


def _long(what: str, text: Any) -> float:
    found = re.fullmatch(r"(\d+\.?\d*)\s*(s|min|h|d)", str(text).strip().lower())
    if found is None:
        raise ClusterError(f"{what} is {text!r}, which is no time: write it like 30s, 5min, 12h or 30d.")
    return float(found[1]) * _LONG[found[2]]


def _device(entry: Any) -> Device:
    if isinstance(entry, str):
        try:
            return device(entry)
        except ValueError as error:
            raise ClusterError(str(error)) from None
    wanted = {"name", "tflops", "memory_gib", "bandwidth_gb"}
    if not isinstance(entry, dict) or set(entry) != wanted:
        raise ClusterError(f"device must be a name, or have exactly {', '.join(sorted(wanted))}.")
    rates = [_number(entry, key) for key in ("tflops", "memory_gib", "bandwidth_gb")]
    if not all(rates):
        raise ClusterError("device must have rates and a memory above 0.")
    return Device(str(entry["name"]), rates[0] * 1e12, rates[1] * GIB, rates[2] * 1e9, sustained=1.0)
