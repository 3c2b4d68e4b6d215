"""One model in training, and what a program may do with it: the names that its pieces use."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn, optim
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

import compress
import dear
from machine import ahead, more_models, preconditioned
from machine.case import Case
from machine.compare import leaves
from machine.modes import counting, counting_functions
from machine.switching import Switching

PATIENCE = 15.0  # seconds for a forked child to answer
OPEN = {"eval with grad", "forward alone"}  # labels of forward passes without a backward pass
#: Updates under which averages are, or may be, on one rank each.
IN_PARTS = ("sharded", "owned", "auto", "switching", *preconditioned.KINDS)
#: Where it is not the name of an update.
UPDATES = {"compressed": "replicated", "switching": "auto", **dict.fromkeys(preconditioned.KINDS, "auto")}


def stays_dense() -> compress.Compressor:
    """A compressor that has not begun."""
    return compress.ACPSGD(rank=2, start_step=10**6)


class Raised(Exception):
    """Raised by a program inside a forward pass, and caught by it."""


class Run:
    """One model in training, plain or under the library, and what its program noted."""

    def __init__(self, case: Case, rank: int, plain: bool, number: int = 0, double: bool = False) -> None:
        self.by_hand: preconditioned.ByHand | None = None
        self.number = number  # of the case in its process group
        torch.manual_seed(0)
        net = getattr(models, case.model, None) or getattr(more_models, case.model)
        self.case, self.rank, self.plain, self.engine = case, rank, plain, None
        self.double = double
        self.net = net().double() if double else net()
        self.model = DDP(self.net, **case.ddp)
        self.params = list(self.net.parameters())
        self.opts = make_optimizers(case, self.params)
        self.opt = self.opts[0]
        self.first_held = [_held(opt) for opt in self.opts]
        self.in_parts = case.how in IN_PARTS
        # More than two ranks' gradients are added in another order, which shows whether or not the library is there.
        self.exact = case.workers <= 2
        self.may_round = not self.exact  # in some setting
        self.notes: list[tuple[int, Any]] = []
        self.values: list[str] = []  # a digest of all parameters before each piece, and at the end; plain DDP's only
        self.piece = -1
        torch.manual_seed(rank)  # what the model draws in training

    # --- what programs call ---

    def attach(self, update: str | None = None) -> None:
        """Puts the library under the model; plain DDP stays as it is. ``update``: another one than the case's, where
        the library is not a compressor."""
        # A forward pass whose backward never came makes plain DDP reduce in a pass under no_sync(), too; a new reducer
        # does not.
        labels = [piece.label for piece in self.case.program]
        if OPEN.intersection(labels[: self.piece]) and "no_sync" in labels[self.piece :]:
            self.exact, self.may_round = False, True
        how = self.case.how
        if how in preconditioned.KINDS:
            self.inexact()
        if self.plain:
            if how in preconditioned.KINDS and self.by_hand is None:
                self.by_hand = preconditioned.ByHand(how, self.model, self.opts)
            return
        if how == "register":
            if self.engine is None:
                levels = {name: value for name, value in self.case.attach.items() if name == "hierarchy"}
                compress.register(self.model, stays_dense(), **levels)
            return
        preconditioner = preconditioned.KINDS[how]() if how in preconditioned.KINDS else None
        compressor = {"compressed": stays_dense, "switching": lambda: Switching(stays_dense)}.get(how, lambda: None)()
        if preconditioner is not None or how == "compressed" or update is None:
            update = UPDATES.get(how, how)
        self.in_parts = self.in_parts or update in IN_PARTS
        options = {"bucket_cap_mb": 0.002, **self.case.attach}
        opts = self.opts if len(self.opts) > 1 else self.opt
        self.engine = dear.attach(
            self.model, opts, compressor=compressor, preconditioner=preconditioner, update=update, **options
        )

    def detach(self) -> None:
        """Back to plain DDP."""
        if self.by_hand is not None:
            self.by_hand.release()
            self.by_hand = None
        if self.engine is not None:
            self.engine.detach()
            self.engine = None

    def late(self, rank: int) -> None:
        """Holds one rank back, so that the other goes on while exchanges wait."""
        if not self.plain and rank == self.rank:
            time.sleep(self.case.delay)

    def ahead(self, step: int) -> None:
        """Backward and step, which rank 0 makes while none of its exchanges can have ended: rank 1 waits for it.

        Sharded or owned, the all-gathers need rank 1's step; replicated, they need its backward (and so does DDP itself
        where it looks for unused parameters: there this cannot be used).
        """
        held = self.case.how if self.rank == 1 and self.engine is not None else ""
        loss = self.forward(step)
        if held == "replicated":
            self._hold()
        loss.backward()
        if held in ("sharded", "owned"):
            self._hold()
        if self.engine is not None and self.rank == 0:  # it may wait in the step already, as for aliases
            ahead.go(f"{self.number}/{self.piece}")
        for opt in self.opts:
            opt.step()

    def _hold(self) -> None:
        ahead.hold(f"{self.number}/{self.piece}")

    def note(self, value: Any) -> None:
        """Records a value to be compared with plain DDP's."""
        for leaf in leaves(value):
            tensor = isinstance(leaf, torch.Tensor)
            if tensor and torch._C._functorch.is_functorch_wrapped_tensor(leaf):
                continue  # inside vmap, where it has no values that could be compared
            self.notes.append((self.piece, leaf.detach().clone() if tensor else leaf))

    def forward(self, step: int) -> torch.Tensor:
        """The loss on this rank's data of a step, noted."""
        if self.model.require_backward_grad_sync and any(param.grad is not None for param in self.params):
            self.inexact()
        x, y = self.data(step)
        output = self.model(x)
        if not self.double:  # torch 2.11 has no backward pass of a loss of two dtypes
            output, y = output.float(), y.float()
        loss = F.mse_loss(output, y)
        self.note(loss)
        return loss

    def data(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's inputs and targets of a step."""
        x, y = models.data(self.rank, step, batch=4)
        return (x.double(), y.double()) if self.double else (x, y)

    def train(self, step: int) -> None:
        """One ordinary training step."""
        self.forward(step).backward()
        for opt in self.opts:
            opt.step()
        for opt in self.opts:
            opt.zero_grad()

    def clip(self, max_norm: float, norm_type: float) -> None:
        """Clips by the norm, as each setting says it is done."""
        if self.engine is not None:
            norm = self.engine.clip_grad_norm_(max_norm, norm_type)
        else:
            held = [param for opt in self.opts for group in opt.param_groups for param in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(held, max_norm, norm_type)
        if norm_type != float("inf") and norm > max_norm:  # of parts on two ranks the norm is rounded otherwise
            self.inexact()
        self.note(norm.float().round(decimals=4))

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's full state; of two optimizers, both states with their ``"state"`` in one."""
        state = self.engine_state()["optimizer"]
        return {"state": _in_one(state), "each": state} if isinstance(state, list) else state

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`optimizer_state` gave."""
        self.load_engine({"optimizer": state.get("each", state)})

    def engine_state(self) -> dict[str, Any]:
        """What the library saves, or the same of plain DDP: the optimizers' states."""
        if self.engine is not None:
            return self.engine.state_dict()
        states = [opt.state_dict() for opt in self.opts]
        found: dict[str, Any] = {"optimizer": states if len(states) > 1 else states[0]}
        return found if self.by_hand is None else found | {"preconditioner": self.by_hand.preconditioner.state_dict()}

    def load_engine(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`engine_state` gave, with the library or without it."""
        if self.engine is not None:
            self.engine.load_state_dict(state)
            return
        if self.by_hand is not None and "preconditioner" in state:
            self.by_hand.preconditioner.load_state_dict(state["preconditioner"])
        states = state["optimizer"]
        for opt, each in zip(self.opts, states if isinstance(states, list) else [states], strict=True):
            opt.load_state_dict(each)

    def full_state(self) -> contextlib.AbstractContextManager[None]:
        """In it ``opt.state_dict()`` is all of the state on any rank, as plain DDP's always is."""
        return self.engine.full_state() if self.engine is not None else contextlib.nullcontext()

    def save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A checkpoint, of the model and of what trains it."""
        return copy.deepcopy((self.net.state_dict(), self.engine_state()))

    def load(self, saved: tuple[dict[str, Any], dict[str, Any]] | None) -> None:
        """Goes back to a checkpoint, if there is one."""
        if saved is not None:
            model, engine = copy.deepcopy(saved)
            self.net.load_state_dict(model)
            self.load_engine(engine)

    def inexact(self) -> None:
        """From here on sums are taken in another order: sharded, averages of two passes are not added up in place."""
        self.may_round = True
        if self.in_parts:
            self.exact = False

    @contextlib.contextmanager
    def raising(self, name: str) -> Any:
        """A module raises in its forward, which the program catches."""

        def fail(module: nn.Module, args: Any) -> None:
            raise Raised

        handle = self.net.get_submodule(name).register_forward_pre_hook(fail)
        try:
            with contextlib.suppress(Raised):
                yield
        finally:
            handle.remove()

    def scope(self) -> dict[str, Any]:
        """The names a program may use."""
        own = (
            "attach",
            "ahead",
            "train",
            "detach",
            "late",
            "note",
            "forward",
            "clip",
            "optimizer_state",
            "load_optimizer",
            "inexact",
            "engine_state",
            "load_engine",
            "full_state",
            "save",
            "load",
        )
        return {
            **{name: getattr(self, name) for name in (*own, "raising", "model", "net", "opt", "params", "rank")},
            "x": lambda step: self.data(step)[0],
            "y": lambda step: self.data(step)[1],
            "opts": self.opts, **({"opt2": self.opts[1]} if len(self.opts) > 1 else {}), "saved_run": None,
            "kept": [], "flat": [], "out": [],
            "run": self, "torch": torch, "nn": nn, "F": F, "dist": dist, "copy": copy, "io": io, "pickle": pickle,
            "contextlib": contextlib, "functional_call": functional_call, "AveragedModel": AveragedModel,
            "parameters_to_vector": parameters_to_vector, "vector_to_parameters": vector_to_parameters,
            "ThreadPoolExecutor": ThreadPoolExecutor, "in_a_fork": in_a_fork,
            "counting": counting, "counting_functions": counting_functions,
        }  # fmt: skip

    def play(self, pieces: int) -> BaseException | None:
        """Runs the first so many pieces and then looks at everything; returns what was raised."""
        scope = self.scope()
        try:
            for self.piece in range(pieces):
                self._digest()
                exec(compile(self.case.program[self.piece].code, "<program>", "exec"), scope)
            self.piece = pieces
            self._digest()
            self._finish()
        except Exception as error:
            return error
        return None

    def _finish(self) -> None:
        # torch cannot save the state of a parameter that no group of its optimizer lists.
        if all(first <= _held(opt) for first, opt in zip(self.first_held, self.opts, strict=True)):
            self.note_all(copy.deepcopy(self.optimizer_state()["state"]))
        self.detach()
        for opt in self.opts:
            for param in self.params:
                if param in opt.state and param not in _held(opt):
                    self.note(sorted(opt.state.pop(param).items()))
        self.note_all(self.optimizer_state()["state"])
        for opt in self.opts:  # and plain DDP trains on
            opt.zero_grad()
        loss = self.forward(99)
        loss.backward()
        for opt in self.opts:
            opt.step(lambda: loss.detach())
        self.note_all(self.optimizer_state()["state"])

    def _digest(self) -> None:
        if self.plain:
            parts = [param.detach().contiguous().flatten().view(torch.uint8).numpy() for param in self.params]
            self.values.append(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())

    def note_all(self, state: Any) -> None:
        """Everything training has made."""
        self.note([param.detach() for param in self.params])
        self.note([buffer for _, buffer in sorted(self.net.named_buffers())])
        self.note([[key, value] for index in sorted(state) for key, value in sorted(state[index].items())])


def _held(opt: optim.Optimizer) -> set[torch.Tensor]:
    """The parameters in its groups."""
    return {param for group in opt.param_groups for param in group["params"]}


def make_optimizers(case: Case, params: list[nn.Parameter]) -> list[optim.Optimizer]:
    """The optimizer of a case, or both, over a model's parameters."""
    half = len(params) // 2
    held = params[:-1] if case.groups == 0 else params  # the last one is for add_param_group()
    if case.second is not None:
        halves = (held[:half], held[half:]) if case.groups < 2 else (held[::2], held[1::2])
        kinds = (case.optimizer, case.second)
        return [_make_optimizer(case, *each) for each in zip(kinds, halves, strict=True)]
    if case.groups < 2:
        return [_make_optimizer(case, case.optimizer, held)]
    groups = [{"params": params[:half], "lr": case.optimizer[1]["lr"] / 2}, {"params": params[half:]}]
    return [_make_optimizer(case, case.optimizer, groups)]


def _make_optimizer(case: Case, chosen: tuple[str, dict[str, Any]], params: list[Any]) -> optim.Optimizer:
    kind, options = copy.deepcopy(chosen)
    make = getattr(optim, kind)
    if case.how == "owned":  # which is for optimizers that want parameters whole
        make = type(kind, (make,), {"dear_whole": True})
    return make(params, **options)


def _in_one(states: list[dict[str, Any]]) -> dict[tuple[int, Any], Any]:
    return {(number, key): value for number, each in enumerate(states) for key, value in each["state"].items()}


def in_a_fork(read: Callable[[], Any]) -> Any:
    """What a forked child reads, as a DataLoader's worker would; its error is raised here."""
    ours, theirs = multiprocessing.Pipe()
    pid = os.fork()
    if pid == 0:
        try:
            theirs.send((True, read()))
        except BaseException as error:
            theirs.send((False, str(error)))
        os._exit(0)
    theirs.close()
    try:
        if not ours.poll(PATIENCE):
            raise TimeoutError("A forked child hung")
        good, value = ours.recv()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not good:
        raise RuntimeError(value)
    return value
