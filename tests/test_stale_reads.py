"""No stale reads: whoever reads a parameter sees it finished, or an error.

Rank 1 is held back, so that rank 0 reads while no all-gather can have ended (see holding.py). What it reads must be
what plain DDP has at that time, bit for bit.
"""

import copy
import ctypes
import io

import pytest
import torch
import training
from holding import SMALL, WARM, parameters_of_plain_ddp, release, step_ahead, warm
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import dear

both_modes = pytest.mark.parametrize("update", ["sharded", "replicated"])


def raw(model):
    """A copy of every parameter and buffer."""
    inner = model.module if isinstance(model, DDP) else model
    found = {}
    for prefix, module in inner.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            found[f"{prefix}.{name}".lstrip(".")] = value.detach().clone()
    return found


def without_prefix(state):
    return {name.removeprefix("module."): value.clone() for name, value in state.items()}


def submodules(model):
    """The state dicts of the inner module's children, under their full names."""
    children = model.module.named_children()
    return {f"{name}.{key}": value for name, child in children for key, value in child.state_dict().items()}


def saved(model):
    file = io.BytesIO()
    torch.save(model.module.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def ones():
    return torch.ones(4, 16, device=place())


def output_of(forward):
    with torch.no_grad():
        return forward(ones())


def synchronized(model, engine):
    engine.synchronize()
    return raw(model)


def recapped(model, engine):
    engine.bucket_cap_mb = 0.003
    return raw(model)


STATE_READS = {
    "state_dict of the DDP module": lambda model, engine: without_prefix(model.state_dict()),
    "state_dict of the inner module": lambda model, engine: model.module.state_dict(),
    "state_dict of submodules": lambda model, engine: submodules(model),
    "saved": lambda model, engine: saved(model),
    "synchronize": synchronized,
    "deepcopy of the inner module": lambda model, engine: raw(copy.deepcopy(model.module)),
    "deepcopy of a submodule": lambda model, engine: {
        f"second.{name}": value for name, value in raw(copy.deepcopy(model.module.second)).items()
    },
    "engine.state_dict, then the parameters": lambda model, engine: engine.state_dict() and raw(model),
    "a change of bucket_cap_mb": recapped,
    "stop_trace": lambda model, engine: (engine.stop_trace(), raw(model))[1],
}

FORWARDS = {
    "no-grad forward": lambda model: output_of(model),
    "inference": lambda model: torch.inference_mode()(model.__call__)(ones()),
    "evaluation": lambda model: output_of(model.eval()),
    "evaluation with gradients": lambda model: model.eval()(ones()).detach(),
    "forward of the inner module": lambda model: output_of(model.module),
    "forward of the inner module with gradients": lambda model: model.module(ones()).detach(),
    "a second forward": lambda model: model(ones()).detach(),
}


def state_reads(rank, world, update):
    steps = WARM + len(STATE_READS)
    want = parameters_of_plain_ddp(rank, "Mlp", steps)
    model, opt, engine = warm(rank, "Mlp", update)
    for step, (name, read) in enumerate(STATE_READS.items(), WARM):
        step_ahead(rank, model, opt, engine, step, name)
        if rank == 0:
            release(name)
        # No value is kept: a step that finds an alias of a parameter waits for everything, here for rank 1.
        stale = [key for key, value in read(model, engine).items() if not torch.equal(value, want[step + 1][key])]
        assert not stale, f"{name}: {stale} are stale"
    engine.detach()


@both_modes
def test_reads_of_the_state_see_finished_parameters(pool2, update):
    pool2.run(state_reads, update)


def forwards(rank, world, update, name):
    want = parameters_of_plain_ddp(rank, name, WARM + len(FORWARDS))
    plain = getattr(training.models, name)().to(place())
    model, opt, engine = warm(rank, name, update)
    for step, (kind, forward) in enumerate(FORWARDS.items(), WARM):
        step_ahead(rank, model, opt, engine, step, kind)
        if rank == 0:
            release(kind)
        have = forward(model)
        plain.load_state_dict(want[step + 1])
        # Not bit for bit: attention takes another path without gradients. Staleness shows a thousand times larger.
        torch.testing.assert_close(have, output_of(plain), msg=lambda text, kind=kind: f"{kind}: {text}")
        model.train()
    engine.detach()


@both_modes
@pytest.mark.parametrize("name", ["Mlp", "Tied", "Functional", "Attention", "Checkpointed"])
def test_forwards_use_finished_parameters(pool2, update, name):
    pool2.run(forwards, update, name)


def training_on(rank, world, update, name):
    """The next training step, not an evaluation: the one place where nobody waits for everything."""
    steps = WARM + 4
    ddp = {"find_unused_parameters": True} if name == "Unused" else {}
    want = parameters_of_plain_ddp(rank, name, steps, ddp=ddp)
    model, opt, engine = warm(rank, name, update, ddp)
    for step in range(WARM, steps):
        if ddp and update == "replicated":  # in backward DDP itself waits for the peer
            training.plain_step(model, opt, rank, step)
            continue
        step_ahead(rank, model, opt, engine, step, f"{name} {step}")
        if rank == 0:
            release(f"{name} {step}")
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, want[steps][key]), f"{key} of {name}"
    engine.detach()


@both_modes
@pytest.mark.parametrize("name", ["Tied", "Functional", "Attention", "Checkpointed", "Unused"])
def test_training_forwards_wait_for_all_they_read(pool2, update, name):
    pool2.run(training_on, update, name)


def bytes_of(param):
    """A host parameter's values as they stand in memory, past every guard."""
    with torch._C.DisableTorchFunctionSubclass():
        address, shape, dtype = param.data_ptr(), param.shape, param.dtype
        return torch.frombuffer(bytearray(ctypes.string_at(address, param.nbytes)), dtype=dtype).view(shape)


def rig(rank, world, update):
    """Without waiting, rank 0 does read stale parameters: the tests above test something."""
    want = parameters_of_plain_ddp(rank, "Mlp", WARM + 1)[WARM + 1]
    model, opt, engine = warm(rank, "Mlp", update)
    step_ahead(rank, model, opt, engine, WARM, "rig")
    if rank == 0:
        early = [bytes_of(param) for param in engine._attached.params]
        assert not all(torch.equal(value, want[name]) for value, name in zip(early, want, strict=True))
        release("rig")
    engine.synchronize()
    assert all(torch.equal(value, want[name]) for name, value in raw(model).items())
    engine.detach()


@both_modes
def test_the_rig_makes_careless_reads_stale(pool2, update):
    pool2.run(rig, update)


def loading(rank, world, update, into):
    """Loaded values are not overwritten by an all-gather or an update that was still on its way."""
    model, opt, engine = warm(rank, "Mlp", update)
    other = {name: torch.full_like(value, 0.25) for name, value in raw(model).items()}
    step_ahead(rank, model, opt, engine, WARM, into)
    if rank == 0:
        release(into)
    if into == "model":
        model.load_state_dict({f"module.{name}": value for name, value in other.items()})
    elif into == "inner":
        model.module.load_state_dict(other)
    else:
        for child in ("first", "second", "last"):
            part = {name.partition(".")[2]: value for name, value in other.items() if name.startswith(child)}
            getattr(model.module, child).load_state_dict(part)
    engine.synchronize()
    assert all(torch.equal(value, other[name]) for name, value in raw(model).items())
    training.plain_step(model, opt, rank, 50)
    engine.synchronize()
    assert not any(torch.equal(value, other[name]) for name, value in raw(model).items()), "it no longer trains"
    engine.detach()


@both_modes
@pytest.mark.parametrize("into", ["model", "inner", "submodules"])
def test_loaded_parameters_stay(pool2, update, into):
    pool2.run(loading, update, into)


def detaching(rank, world, update):
    want = parameters_of_plain_ddp(rank, "Mlp", WARM + 1)[WARM + 1]
    model, opt, engine = warm(rank, "Mlp", update)
    step_ahead(rank, model, opt, engine, WARM, "detach")
    if rank == 0:
        release("detach")
    engine.detach()
    assert all(torch.equal(value, want[name]) for name, value in raw(model).items())


@both_modes
def test_detach_leaves_finished_parameters(pool2, update):
    pool2.run(detaching, update)


def without_overlap(rank, world, update):
    """overlap_forward=False: step() itself waits."""
    want = parameters_of_plain_ddp(rank, "Mlp", 4)
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, overlap_forward=False, **SMALL)
    for step in range(4):
        training.plain_step(model, opt, rank, step)
        assert all(torch.equal(value, want[step + 1][name]) for name, value in raw(model).items())
    engine.detach()


@both_modes
def test_without_overlap_step_waits(pool2, update):
    pool2.run(without_overlap, update)


def averaged(rank, world, update):
    """An exponential average taken right after step(), as torch's own helper takes it."""
    model, opt, engine = warm(rank, "Mlp", update)
    want = parameters_of_plain_ddp(rank, "Mlp", WARM + 1)[WARM + 1]
    average = torch.optim.swa_utils.AveragedModel(training.models.Mlp())
    step_ahead(rank, model, opt, engine, WARM, "average")
    if rank == 0:
        release("average")
    average.update_parameters(model.module)
    for name, value in average.module.state_dict().items():
        assert torch.equal(value, want[name]), name
    engine.detach()


@both_modes
def test_averages_of_the_parameters_see_them_finished(pool2, update):
    pool2.run(averaged, update)
