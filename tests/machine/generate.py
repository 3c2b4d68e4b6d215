"""Draws cases: training steps with everything a script may do between their parts."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from typing import Any

import models

from machine import more_models, more_uses
from machine.case import HOWS, Case, Piece
from machine.vocabulary import (
    AVERAGES,
    ENGINE,
    FORWARDS,
    FREEZING,
    GRADS,
    HOOKS,
    HYPER,
    LAYOUT,
    MORE_GRADS,
    OWN_OPTIMIZER,
    READS,
    STATE,
    STRUCTURE,
    WHOLE,
    WRITES,
)

MODELS: dict[str, list[dict[str, Any]]] = {  # with the options that DDP needs, or may have
    "Mlp": [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}],
    "Tied": [{}, {"gradient_as_bucket_view": True}],
    "Functional": [{}, {"gradient_as_bucket_view": True}],
    "Attention": [{}],
    "Checkpointed": [{}],
    "Convolution": [{}, {"gradient_as_bucket_view": True}, {"broadcast_buffers": False}],
    "Unused": [{"find_unused_parameters": True}, {"find_unused_parameters": True, "gradient_as_bucket_view": True}],
    "StaticallyUnused": [{"static_graph": True}],
    "Frozen": [{}],
    "MixedTypes": [{}],
    "Shared": [{}, {"gradient_as_bucket_view": True}],
    "Bare": [{}, {"find_unused_parameters": True}],
    "Noisy": [{}],
}
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "foreach": True}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "foreach": False}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9}),
    ("Adagrad", {"lr": 0.05}),
    ("NAdam", {"lr": 0.01}),
    ("Adamax", {"lr": 0.01}),
    ("Adafactor", {"lr": 0.01}),  # replicated only
]

ATTACH: list[dict[str, Any]] = [  # options beside the update
    {}, {}, {}, {}, {"overlap_forward": False}, {"check_replicas": 1}, {"hierarchy": 2}, {"bucket_cap_mb": 25.0},
]  # fmt: skip
SECOND = 0.05  # of the attachments while one is there
WAYS = ("sharded", "owned", "replicated", "auto")
WAYS_OF_TWO = ("sharded", "owned", "auto")  # of two optimizers; the others take one, and say so
EXTRAS = [  # how often, relative to each other
    (READS, 8), (WRITES, 6), (STATE, 5), (AVERAGES, 5), (FORWARDS, 5), (HYPER, 3), (ENGINE, 2), (FREEZING, 1),
    (LAYOUT, 1), (HOOKS, 2), (STRUCTURE, 4), (OWN_OPTIMIZER, 3), (WHOLE, 6), (more_uses.SAVES, 4), (more_uses.ANEW, 3),
    (more_uses.KEPT, 5), (more_uses.OUT_AND_BACK, 4),
]  # fmt: skip
EXTRAS_OF_TWO = [(more_uses.TWO, 6), (more_uses.WHOLE, 8)]
STEPS = {
    "opt.step()": (20, ""),
    "opt.step(); opt.step()": (1, "step twice"),
    "opt.step(lambda: None)": (1, "closure"),
    "pass": (1, "no step"),
}
ZEROS = {
    "opt.zero_grad()": (16, ""),
    "opt.zero_grad(set_to_none=False)": (3, "zero in place"),
    "model.zero_grad()": (1, "model.zero_grad"),
    "net.zero_grad(set_to_none=False)": (1, "zero in place"),
    "inexact()": (1, "no zero_grad"),
}
PASSES = {
    "forward({step}).backward()": (16, ""),
    "with model.no_sync(): forward({step}).backward()\nforward(50 + {step}).backward()": (2, "no_sync"),
    "loss = forward({step}) + forward(50 + {step})\nloss.backward()": (1, "two forwards"),
    "loss = forward({step})\nloss.backward(retain_graph=True)\ninexact()\nloss.backward()": (1, "backward twice"),
    "with torch.autocast('cpu', torch.bfloat16): loss = forward({step})\nloss.backward()": (1, "autocast"),
    "forward({step})\nforward(50 + {step}).backward()": (1, "forward alone"),
}


def weighted(rng: random.Random, choices: dict[str, tuple[int, str]]) -> tuple[str, str]:
    """One of the pieces and its label."""
    code = rng.choices(list(choices), [weight for weight, _ in choices.values()])[0]
    return code, choices[code][1]


class Names:
    """How a program can reach the parameters of a model."""

    def __init__(self, model: str, unused: bool, two: bool = False, workers: int = 2) -> None:
        net = (getattr(models, model, None) or getattr(more_models, model))()
        self.names = [name for name, _ in net.named_parameters()]
        self.modules = [name for name, module in net.named_modules() if name and not list(module.children())]
        self.held = 0  # so many are in the optimizer's first group, and the first ones of the model
        self.two, self.workers, self.ways = two, workers, WAYS_OF_TWO if two else WAYS
        self.unused = unused  # parameters may go unused: otherwise plain DDP reduces nothing beside a frozen one

    def param(self, rng: random.Random) -> str:
        """An expression for one parameter."""
        index = rng.randrange(len(self.names))
        path, _, leaf = self.names[index].rpartition(".")
        owner = "net" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split(".") if part)
        roads = [f"params[{index}]", f"{owner}._parameters[{leaf!r}]", f"list(model.parameters())[{index}]"]
        roads.append(f"{owner}[{leaf}]" if leaf.isdigit() else f"{owner}.{leaf}")
        if index < self.held:
            roads.append(f"opt.param_groups[0]['params'][{index}]")
        return rng.choice(roads)

    def fill(self, rng: random.Random, code: str) -> str:
        """The piece with a parameter and a module in its places."""
        way = rng.choice(self.ways) if "{way" in code else ""
        return code.format(p=self.param(rng), module=rng.choice(self.modules), way=way)


def generate(
    seed: int, without: Collection[str] = (), how: str | None = None, workers: int = 2, optimizers: int | None = None
) -> Case:
    """The case of a seed.

    without: labels that it must not have; "static_graph" is one.
    workers: more than two are in nodes of two, most often.
    optimizers: one or two; None leaves that to the seed.
    """
    rng = random.Random(seed)
    two = optimizers == 2 or (optimizers is None and how in (None, *WAYS_OF_TWO, "switching") and rng.random() < 0.2)
    how = how or rng.choice((*WAYS_OF_TWO, "switching") if two else (*HOWS, *HOWS, "auto", "switching"))
    model = rng.choice(list(MODELS))
    ddp = rng.choice(MODELS[model])
    if "static_graph" in without and "static_graph" in ddp:
        model, ddp = "Mlp", {}
    served = OPTIMIZERS[:-1] if how == "sharded" else OPTIMIZERS
    optimizer, second = rng.choice(served), rng.choice(served) if two else None
    groups = rng.choice((1, 1, 2, 0))
    attach = rng.choice(ATTACH)
    if workers > 2:
        attach = attach | rng.choice(({"hierarchy": 2},) * 7 + ({},))
    names = Names(model, bool(ddp.get("find_unused_parameters")), two, workers)
    count = len(names.names)
    names.held = {1: count // 2 if two else count, 2: 0 if two else count // 2, 0: (count - 1) // (1 + two)}[groups]
    pieces = list(program(rng, names))
    if ddp.get("gradient_as_bucket_view"):  # the next pass overwrites a gradient that is kept, in plain DDP alone
        pieces = [piece for piece in pieces if piece.label != "keep grads"]
    kept = [piece for piece in pieces if piece.label not in without]
    kept = list(attached_once(rng, kept, how))
    if how == "register":  # which has no other option
        attach = {name: value for name, value in attach.items() if name == "hierarchy" and workers > 2}
    return Case(how, model, optimizer, groups, second, workers, ddp, attach, tuple(kept))


def attached_once(rng: random.Random, pieces: Collection[Piece], how: str) -> Iterator[Piece]:
    """Most of the second attachments left out: they are refused, and nothing behind them would be seen."""
    attached = False
    for piece in pieces:
        attaches, detaches = "attach(" in piece.code, "detach()" in piece.code
        # A hook that compress.register() has put under a model stays there: detach() is of an engine.
        stays = attached and (how == "register" or not detaches)
        if attaches and stays and rng.random() >= SECOND:
            continue
        yield piece
        attached = attaches or stays


def program(rng: random.Random, names: Names) -> Any:
    """A stream of pieces."""
    steps = rng.randint(3, 6)
    attach_at = rng.choice((0, 0, 0, 0, 2))
    if names.unused and rng.random() < 0.1:
        yield Piece(names.fill(rng, "{p}.requires_grad_(False)"), "freeze")
    extras = [(table, weight) for table, weight in EXTRAS if table is not FREEZING]
    if names.unused:
        extras.append((FREEZING, 5))
    if names.two:
        extras += EXTRAS_OF_TWO
    by_turns = names.two and rng.random() < 0.2
    zeros = more_uses.ZEROS if names.two else ZEROS
    for step in range(steps):
        if step == attach_at:
            yield Piece("attach()")
        yield from lateness(rng, names.workers)
        code, label = weighted(rng, PASSES)
        yield Piece(code.format(step=step), label)
        if rng.random() < 0.2:
            yield one(rng, names, rng.choice((GRADS, MORE_GRADS, more_uses.KEPT)))
        if rng.random() < 0.1:
            yield one(rng, names, rng.choices([t for t, _ in extras], [w for _, w in extras])[0])
        if rng.random() < 0.03:
            yield Piece("opt.zero_grad()", "zero_grad first")
        yield from lateness(rng, names.workers)
        if by_turns:
            yield Piece(more_uses.BY_TURNS[step % 2], "by turns")
        else:
            code, label = weighted(rng, more_uses.STEPS if names.two else STEPS)
            yield Piece(names.fill(rng, code), label)
        if rng.random() < 0.3:
            yield one(rng, names, rng.choices([t for t, _ in extras], [w for _, w in extras])[0])
        yield Piece(*weighted(rng, zeros))
        while rng.random() < 0.5:
            yield one(rng, names, rng.choices([t for t, _ in extras], [w for _, w in extras])[0])


def one(rng: random.Random, names: Names, table: dict[str, str]) -> Piece:
    """One piece of a table."""
    code = rng.choice(list(table))
    return Piece(names.fill(rng, code), table[code])


def lateness(rng: random.Random, workers: int) -> Any:
    """Sometimes one rank comes late."""
    if rng.random() < 0.4:
        yield Piece(f"late({rng.randrange(workers)})")
