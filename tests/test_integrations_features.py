"""Features of torch and of frameworks that few use, on two workers: as with plain DDP, or one sentence that says why
not."""

from __future__ import annotations

import copy
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import training
from frameworks import as_torchrun, check_replicas, optimizer_for, options, same
from torch.distributed.algorithms import Join

import compress
import dear
from dear.integrations.dcp import TrainingState

UPDATES = ["sharded", "replicated", "owned"]
EVERY = [*UPDATES, "power", "hook-power"]


def compare(have, want, name, exact=True, what=""):
    """Plain DDP's parameters; with a compressor, equal ones on every rank that are not far away."""
    check_replicas(have)
    if name in UPDATES:
        same(have, want, exact, what)
    else:
        total = sum(float((have[key] - want[key]).square().sum()) for key in want) ** 0.5
        assert 0 < total < 0.5 * sum(float(value.square().sum()) for value in want.values()) ** 0.5, (what, total)


# --- Lightning ---


def averaging():
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)


def by_schedule():
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    return GradientAccumulationScheduler({0: 2, 1: 3})


LIGHTNING = {  # options of the Trainer, and a callback
    "accumulation by schedule": ({}, by_schedule),
    "overfit_batches": ({"overfit_batches": 3}, None),
    "stochastic weight averaging": ({"max_epochs": 4}, averaging),
    "limited batches": ({"limit_train_batches": 5, "accumulate_grad_batches": 2}, None),
    "validation before": ({}, None),
}


def lightning(rank, world, name, feature):
    from test_integrations_lightning import Net, fit, loader, with_library

    def train(**arguments):
        trainer, callback = LIGHTNING[feature]
        net = Net(optimizer_for(name))
        if feature == "validation before":
            arguments["before"] = lambda trainer: trainer.validate(net, loader(2), verbose=False)
        own = [] if callback is None else [callback()]
        return fit(net, callbacks=[*own, *arguments.pop("callbacks", ())], **arguments, **trainer)[1]

    with as_torchrun(rank, world):
        compare(train(**with_library("callback", name)), train(), name, what=feature)


@pytest.mark.slow
@pytest.mark.parametrize("feature", LIGHTNING)
@pytest.mark.parametrize("name", EVERY)
def test_lightning(pool2, name, feature):
    pytest.importorskip("lightning")
    pool2.run(lightning, name, feature)


# --- Accelerate ---


def accelerated(rank, world, name, feature, folder):
    from accelerate.utils import GradientAccumulationPlugin
    from test_integrations_accelerate import Training

    def train(which):
        if feature == "a last batch that is alone":  # the sixth, after four
            return Training(which, kind=optimizer_for(name), gradient_accumulation_steps=4).train(range(6))
        if feature == "accumulation over epochs":
            plugin = GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
            run = Training(which, kind=optimizer_for(name), gradient_accumulation_plugin=plugin)
            return run.train(range(6)).train(range(6))
        # What was accumulated is lost with the process, for plain DDP too.
        first = Training(which, kind=optimizer_for(name), gradient_accumulation_steps=2).train(range(3))
        first.accelerator.save_state(f"{folder}/{which}")
        resumed = Training(which, seed=3, kind=optimizer_for(name), gradient_accumulation_steps=2)
        resumed.accelerator.load_state(f"{folder}/{which}")
        return resumed.train(range(3, 6))

    with as_torchrun(rank, world):
        have, want = train(name).parameters(), train(None).parameters()
        compare(have, want, name, what=feature)


ACCELERATE = ["a last batch that is alone", "accumulation over epochs", "a state in mid-accumulation"]


@pytest.mark.slow
@pytest.mark.parametrize("feature", ACCELERATE)
@pytest.mark.parametrize("name", EVERY)
def test_accelerate(pool2, name, feature, tmp_path):
    pytest.importorskip("accelerate")
    pool2.run(accelerated, name, feature, str(tmp_path))


# --- Transformers and PEFT ---

TRAINER = {
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "a second train()": {},
}


def transformed(rank, world, folder, name, feature):
    from test_integrations_transformers import make, result

    large = f"{name}-large" if feature == "torch_compile" and name in UPDATES else name

    def train(which):
        torch._dynamo.reset()
        trainer, _ = make(folder, which, None, optimizer_for(name), max_grad_norm=0.0, **TRAINER[feature])
        if feature == "a second train()":
            trainer.train()
        return result(trainer)[0]

    with as_torchrun(rank, world):
        compare(train(large), train(None), name, exact=False, what=feature)  # the Trainer's AdamW is fused


@pytest.mark.slow
@pytest.mark.parametrize("feature", TRAINER)
@pytest.mark.parametrize("name", EVERY)
def test_transformers(pool2, tmp_path, name, feature):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pool2.run(transformed, str(tmp_path), name, feature)


def own_adafactor(rank, world, folder, name):
    """The Trainer's own Adafactor, which nothing is known of: replicated, or refused."""
    from test_integrations_transformers import make, result

    with as_torchrun(rank, world):
        how = {"optim": "adafactor", "max_grad_norm": 0.0}
        trainer, _ = make(folder, name, None, torch.optim.AdamW, **how)
        if name in ("sharded", "owned"):
            with pytest.raises(ValueError, match=r'Adafactor.*use update="replicated"'):
                trainer.train()
            return
        have, want = result(trainer)[0], result(make(folder, None, None, torch.optim.AdamW, **how)[0])[0]
        compare(have, want, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded", "replicated", "power"])
def test_the_trainers_adafactor(pool2, tmp_path, name):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pool2.run(own_adafactor, str(tmp_path), name)


def merged(rank, world, folder, name):
    """LoRA's factors are merged into the model after training."""
    import peft
    from test_integrations_transformers import make, small

    def train(which):
        torch.manual_seed(0)
        model = peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["c_attn"]))
        trainer, _ = make(folder, which, model, optimizer_for(name), max_grad_norm=0.0)
        trainer.train()
        whole = trainer.model.merge_and_unload()
        return {key: value.clone() for key, value in whole.state_dict().items()}

    with as_torchrun(rank, world):
        compare(train(name), train(None), name, exact=name != "sharded")


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_merging_lora(pool2, tmp_path, name):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    pool2.run(merged, str(tmp_path), name)


# --- loops of one's own ---


def trained(rank, name, library=True, step=training.plain_step, steps=6):
    """A model, its optimizer and its engine after some steps; without the library plain DDP."""
    model, opt = training.build("Mlp", (optimizer_for(name), {"lr": 0.01}), {})
    engine = dear.attach(model, opt, **options(name)) if library else None
    for index in range(steps):
        step(model, opt, rank, index)
    return model, opt, engine


def values(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def compiled_step(rank, world, name):
    """The optimizer's step is compiled by the caller. The library runs it as it is."""
    torch._dynamo.reset()
    compiled = {}

    def step(model, opt, rank, index):
        training.loss_of(model, rank, index).backward()
        if opt not in compiled:
            compiled[opt] = torch.compile(opt.step, backend="eager")
        compiled[opt]()
        opt.zero_grad()

    have = values(trained(rank, name, step=step)[0])
    compare(have, values(trained(rank, name, library=False)[0]), name)
    compare(have, values(trained(rank, name, library=False, step=step)[0]), name, exact=False)


@pytest.mark.parametrize("name", [*UPDATES, "power"])
def test_a_compiled_step(pool2, name):
    pool2.run(compiled_step, name)


def saved_meanwhile(rank, world, folder, name):
    """DCP writes in the background, while training goes on."""
    model, opt, engine = trained(rank, name, steps=3)
    group = dist.new_group(backend="gloo")
    path = f"{folder}/checkpoint"
    then = copy.deepcopy(values(model))
    writing = dcp.async_save({"training": TrainingState(model, opt, engine)}, checkpoint_id=path, process_group=group)
    for index in range(3, 6):
        training.plain_step(model, opt, rank, index)
    writing.result()
    want = values(model)
    other, other_opt, other_engine = trained(rank, name, steps=1)
    dcp.load({"training": TrainingState(other, other_opt, other_engine)}, checkpoint_id=path, process_group=group)
    same(values(other), then)
    for index in range(3, 6):
        training.plain_step(other, other_opt, rank, index)
    same(values(other), want)
    engine.detach()
    other_engine.detach()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*UPDATES, "power"])
def test_a_checkpoint_in_the_background(pool2, tmp_path, name):
    pool2.run(saved_meanwhile, str(tmp_path), name)


def joining(rank, world):
    """DDP's own join: the steps of a rank that has ended are shadowed, which no exchange of ours can be."""
    model, opt, engine = trained(rank, "sharded", steps=2)
    for join in (model.join, lambda: Join([model])):  # the latter is what Accelerate's join_uneven_inputs() enters
        with pytest.raises(RuntimeError, match=r"join\(\) cannot be used with dear.attach.*engine.detach"), join():
            pass
    engine.detach()
    step = functools.partial(training.plain_step, model, opt, rank)
    with model.join():
        for index in range(2 + rank):  # uneven
            step(index)
    check_replicas(values(model))


def test_join_is_refused_until_detached(pool2):
    pool2.run(joining)


class Foreign:
    """A process group that torch.distributed has not made."""


def foreign(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    group, model.process_group = model.process_group, Foreign()
    for refuse in (lambda: dear.attach(model, opt), lambda: compress.register(model, compress.TopK())):
        with pytest.raises(ValueError, match=r"is a Foreign that torch.distributed did not make"):
            refuse()
    model.process_group = group
    dear.attach(model, opt).detach()


def test_a_group_of_unknown_members_is_refused(pool2):
    pool2.run(foreign)


def ft(rank, world):
    """torchft's DDP reduces through a manager, on a dummy group."""
    from torchft.ddp import DistributedDataParallel
    from torchft.manager import Manager

    net = torch.nn.Linear(4, 4)
    model = DistributedDataParallel(mock.create_autospec(Manager), net)
    with pytest.raises(ValueError, match=r"is a ProcessGroupDummy .* as those of torchft"):
        dear.attach(model, torch.optim.SGD(net.parameters(), lr=0.1))


@pytest.mark.slow
def test_torchft_is_refused(pool2):
    pytest.importorskip("torchft")
    pool2.run(ft)
