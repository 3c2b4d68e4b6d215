"""One worker's queues in a simulation: its compute thread, its lanes, and the passes over the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .events import Simulation, Stage, Task
from .machine import Machine
from .network import Network
from .profile import Group, Profile

COMPUTE, DECODE = "compute", "decode"
CPU: tuple[tuple[str, float], ...] = (("cpu", 1.0),)


@dataclass(frozen=True)
class Gate:
    """What the first layer of ``layers`` in a forward pass waits for, and an update that is due there."""

    layers: frozenset[int]
    after: tuple[Task, ...]
    update: float = 0.0


class Worker:
    """Adds a worker's tasks. All workers do the same at the same time, so one stands for all."""

    def __init__(self, profile: Profile, network: Network, machine: Machine) -> None:
        links = {hop.link for hops in network.phases.values() for hop in hops}
        capacity = dict.fromkeys(links, 1.0)
        if machine.cores is not None:
            capacity["cpu"] = machine.cores
        self.simulation = Simulation(capacity, network.bursts)
        # A profile's times are those of a floor that was measured on the same cores: undo what sharing did to it.
        share = 1.0 if machine.cores is None else min(1.0, machine.cores)
        self.scale = machine.slowest(network.workers) * share
        self.profile, self.network, self.machine = profile, network, machine

    def compute(self, name: str, seconds: float, after: Iterable[Task] = ()) -> Task:
        return self.simulation.add(name, COMPUTE, (Stage(seconds * self.scale, CPU),), after)

    def work(self, name: str, queue: str, seconds: float, after: Iterable[Task] = ()) -> Task:
        """CPU work whose time does not come from the profile."""
        return self.simulation.add(name, queue, (Stage(seconds, CPU),), after)

    def exchange(
        self, phase: str, name: str, queue: str, bytes_: float, after: Iterable[Task], before: float = 0.0
    ) -> Task:
        """A collective in a lane. before: seconds of work on the lane's thread that make its payload."""
        stages = [Stage(before, CPU)]
        for hop in self.network.phases[phase] if bytes_ else ():
            busy = self.machine.exchange_cpu * hop.share * bytes_
            moving = max(hop.line.beta * bytes_, busy)
            needs = ((hop.link, 1.0), ("cpu", busy / moving)) if moving else ()
            stages += [Stage(hop.line.alpha), Stage(moving, needs)]
        return self.simulation.add(name, queue, stages, after)

    def forward(self, gates: Sequence[Gate]) -> Task:
        """A forward pass, in runs of layers between which it waits; the last task."""
        due: defaultdict[int, list[Gate]] = defaultdict(list)
        for gate in gates:
            due[min(gate.layers)].append(gate)
        run = 0.0
        for number, layer in enumerate(self.profile.layers):
            if number in due:
                self.compute("forward", run)
                run = 0.0
                for gate in due[number]:
                    self.compute("update", gate.update, gate.after)
            run += layer.forward
        return self.compute("forward", run)

    def backward(self, groups: Sequence[Group]) -> Iterable[tuple[int, Group, Task]]:
        """A backward pass: each group with the task after which its gradients are there.

        What is added to the compute thread between two groups, such as encoding, stands in its place.
        """
        order = self.profile.backward_order
        position = {layer: index for index, layer in enumerate(order)}
        done = 0
        for number, group in enumerate(groups):
            until = max(position[layer] for layer in group.layers) + 1
            seconds = sum(self.profile.layers[layer].backward for layer in order[done:until])
            done = max(done, until)
            if number == len(groups) - 1:  # layers without parameters
                seconds += sum(self.profile.layers[layer].backward for layer in order[done:])
            task = self.compute(f"backward {number}", seconds)
            if self.machine.hook:
                task = self.work(f"hook {number}", COMPUTE, self.machine.hook)
            yield number, group, task

    def gather_order(self, groups: Sequence[Group]) -> list[int]:
        """Groups in the order in which a forward pass needs them."""
        return sorted(range(len(groups)), key=lambda index: (min(groups[index].layers), -index))
