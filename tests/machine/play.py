"""Runs a case in a worker: its program under plain DDP, then under the library, and compares what they noted."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn, optim
from torch.distributed import distributed_c10d as c10d
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

import compress
import dear
from machine import ahead, more_models
from machine.case import Case, Result
from machine.compare import Rounding, compare, leaves
from machine.modes import counting, counting_functions

PATIENCE = timedelta(seconds=60)  # for a peer to end the same case
COMPRESSOR = compress.ACPSGD
COLLECT_EVERY = 50  # cases
REMEMBERED = 4  # programs of the last cases, as plain DDP ran them
_played = 0
_remembered: dict[str, Plain] = {}
OPEN = {"eval with grad", "forward alone"}  # labels of forward passes without a backward pass
DENSE = {"rank": 2, "start_step": 10**6}


class Raised(Exception):
    """Raised by a program inside a forward pass, and caught by it."""


class Run:
    """One model in training, plain or under the library, and what its program noted."""

    def __init__(self, case: Case, rank: int, plain: bool, number: int = 0, double: bool = False) -> None:
        self.number = number  # of the case in its process group
        torch.manual_seed(0)
        net = getattr(models, case.model, None) or getattr(more_models, case.model)
        self.case, self.rank, self.plain, self.engine = case, rank, plain, None
        self.double = double
        self.net = net().double() if double else net()
        self.model = DDP(self.net, **case.ddp)
        self.params = list(self.net.parameters())
        self.opt = self._optimizer()
        self.exact = True
        self.may_round = False  # in some setting
        self.notes: list[tuple[int, Any]] = []
        self.values: list[str] = []  # a digest of all parameters before each piece, and at the end; plain DDP's only
        self.piece = -1
        torch.manual_seed(rank)  # what the model draws in training

    def _optimizer(self) -> optim.Optimizer:
        kind, options = copy.deepcopy(self.case.optimizer)
        make = getattr(optim, kind)
        if self.case.how == "owned":  # which is for optimizers that want parameters whole
            make = type(kind, (make,), {"dear_whole": True})
        if self.case.groups == 1:
            return make(self.params, **options)
        half = len(self.params) // 2
        if self.case.groups == 0:  # the last parameter is left out, for add_param_group()
            return make(self.params[:-1], **options)
        lr = options["lr"]
        groups = [{"params": self.params[:half], "lr": lr / 2}, {"params": self.params[half:]}]
        return make(groups, **options)

    # --- what programs call ---

    def attach(self, update: str | None = None) -> None:
        """Puts the library under the model; plain DDP stays as it is."""
        # A forward pass whose backward never came makes plain DDP reduce in a pass under no_sync(), too; a new reducer
        # does not.
        labels = [piece.label for piece in self.case.program]
        if OPEN.intersection(labels[: self.piece]) and "no_sync" in labels[self.piece :]:
            self.exact, self.may_round = False, True
        if self.plain:
            return
        how = self.case.how
        if how == "register":
            if self.engine is None:
                compress.register(self.model, COMPRESSOR(**DENSE))
            return
        compressor = COMPRESSOR(**DENSE) if how == "compressed" else None
        if update is None or compressor is not None:
            update = "replicated" if how == "compressed" else how
        options = {"bucket_cap_mb": 0.002, **self.case.attach}
        self.engine = dear.attach(self.model, self.opt, compressor=compressor, update=update, **options)

    def detach(self) -> None:
        """Back to plain DDP."""
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
        self.opt.step()

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
        self.opt.step()
        self.opt.zero_grad()

    def clip(self, max_norm: float, norm_type: float) -> None:
        """Clips by the norm, as each setting says it is done."""
        if self.engine is not None:
            norm = self.engine.clip_grad_norm_(max_norm, norm_type)
        else:
            held = [param for group in self.opt.param_groups for param in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(held, max_norm, norm_type)
        self.note(norm.float().round(decimals=4))

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's full state."""
        return self.engine.state_dict()["optimizer"] if self.engine is not None else self.opt.state_dict()

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`optimizer_state` gave."""
        if self.engine is not None:
            self.engine.load_state_dict({"optimizer": state})
        else:
            self.opt.load_state_dict(state)

    def inexact(self) -> None:
        """From here on sums are taken in another order: sharded, averages of two passes are not added up in place."""
        self.may_round = True
        if self.case.how in ("sharded", "owned"):
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
        )
        return {
            **{name: getattr(self, name) for name in (*own, "raising", "model", "net", "opt", "params", "rank")},
            "x": lambda step: self.data(step)[0],
            "y": lambda step: self.data(step)[1],
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
        state = copy.deepcopy(self.optimizer_state()["state"])
        self.note_all(state)
        self.detach()
        self.note_all(self.opt.state_dict()["state"])
        self.opt.zero_grad()  # and plain DDP trains on
        loss = self.forward(99)
        loss.backward()
        self.opt.step(lambda: loss.detach())
        self.note_all(self.opt.state_dict()["state"])

    def _digest(self) -> None:
        if self.plain:
            parts = [param.detach().contiguous().flatten().view(torch.uint8).numpy() for param in self.params]
            self.values.append(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())

    def note_all(self, state: Any) -> None:
        """Everything training has made."""
        self.note([param.detach() for param in self.params])
        self.note([buffer for _, buffer in sorted(self.net.named_buffers())])
        self.note([[key, value] for index in sorted(state) for key, value in sorted(state[index].items())])


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
        if not ours.poll(PATIENCE.total_seconds() / 4):
            raise TimeoutError("A forked child hung")
        good, value = ours.recv()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not good:
        raise RuntimeError(value)
    return value


@dataclasses.dataclass(frozen=True)
class Plain:
    """What a program does under plain DDP."""

    notes: list[tuple[int, Any]]
    valid: int  # how many of its pieces plain DDP can run; 0: the program is none
    why: str = ""  # it can run no more
    rounding: Rounding | None = None  # where a sum may be taken in another order
    values: Sequence[str] = ()  # digests of this rank's parameters


def under_plain_ddp(case: Case, rank: int) -> Plain:
    """The program under plain DDP, which is the same however the library is put under it: cases that differ in nothing
    else follow one another. All ranks remember alike, since they have played the same cases."""
    key = repr(dataclasses.replace(case, how="owned" if case.how == "owned" else "", attach={}, delay=0.0))
    if key not in _remembered:
        while len(_remembered) >= REMEMBERED:
            del _remembered[next(iter(_remembered))]
        try:
            _remembered[key] = _play_plain(case, rank)
        finally:
            torch.set_default_dtype(torch.float32)  # for the run that it is compared with
    return _remembered[key]


def _play_plain(case: Case, rank: int) -> Plain:
    run = Run(case, rank, plain=True)
    valid, why = len(case.program), ""
    error = run.play(valid)
    if error is not None:
        valid, why = run.piece, _text(error)  # plain DDP fails there: what comes before must be equal all the same
        run = Run(case, rank, plain=True)
        if valid == 0 or run.play(valid) is not None:
            return Plain([], 0, why)
    rounding = None
    if run.may_round:
        twin = Run(case, rank, plain=True, double=True)
        twin.play(valid)
        rounding = Rounding(run.notes, twin.notes)
    return Plain(run.notes, valid, why, rounding, run.values)


def play(rank: int, case: Case, number: int = 0) -> Result:
    """One case on this rank."""
    want = under_plain_ddp(case, rank)
    if want.valid == 0:
        return Result("invalid", 0, want.why)
    have = Run(case, rank, plain=False, number=number)
    try:
        raised = have.play(want.valid)
        rounding = None if have.exact else want.rounding
        different = compare(have.notes, want.notes, None if raised else want.valid, rounding)
        if raised is not None and have.engine is not None:
            with contextlib.suppress(Exception):  # tell the peer at once
                have.engine.__exit__(type(raised), raised, raised.__traceback__)
    finally:
        torch.set_default_dtype(torch.float32)
    if different:
        return Result("difference", *different)
    if raised is None:
        return Result("equal", want.valid)
    where = "".join(traceback.format_exception(raised)[-8:])
    return Result("error", have.piece, _text(raised), where, tuple(want.values[have.piece : have.piece + 2]))


def _text(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def play_all(rank: int, world: int, cases: list[Case]) -> list[Result]:
    """Cases one after another, up to and with the first that is not equal: then the group is to be left."""
    store = c10d._get_default_store()
    results = []
    for index, case in enumerate(cases):
        result = play(rank, case, index)
        results.append(result)
        store.set(f"case/{index}/{rank}", "equal" if result.kind == "equal" else "other")
        others = [f"case/{index}/{peer}" for peer in range(world)]
        store.wait(others, PATIENCE)
        if any(store.get(key) != b"equal" for key in others):
            break
    global _played
    _played += len(results)
    if _played >= COLLECT_EVERY:
        _played = 0
        gc.collect()  # dropped models and engines hang in circles
    return results
