"""Optimizer and model state: saved, resumed, handed over to and from plain DDP, at this and at another world size."""

import io

import pytest
import torch
import torch.distributed as dist
import training
from place import place
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel as DDP
from training import SMALL

import dear

ADAM = (optim.AdamW, {"lr": 0.01, "amsgrad": True})
both_modes = pytest.mark.parametrize("update", ["sharded", "replicated"])


def steps(model, optimizer, rank, numbers):
    return [training.plain_step(model, optimizer, rank, step) for step in numbers]


def values(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(have, want):
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(have[name], value), f"{name} differs by {(have[name] - value).abs().max()}"


def same_optimizer(have, want):
    """Two optimizer state dicts are equal bit for bit."""
    assert have["param_groups"] == want["param_groups"]
    assert have["state"].keys() == want["state"].keys()
    for index, state in want["state"].items():
        assert have["state"][index].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(have["state"][index][key]), torch.as_tensor(value)), (index, key)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def fresh(optimizer=ADAM, **attach):
    """Another start than training.build gives, so that only what is loaded can make it equal."""
    torch.manual_seed(99)
    model = DDP(training.models.Mlp().to(place()))
    opt = optimizer[0](model.parameters(), **optimizer[1])
    return model, opt, dear.attach(model, opt, **{**SMALL, **attach})


def resumed(rank, world, update, optimizer, warm):
    plain, plain_opt = training.build("Mlp", optimizer, {})
    want = steps(plain, plain_opt, rank, range(8))
    model, opt = training.build("Mlp", optimizer, {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    have = steps(model, opt, rank, range(4))
    model.eval()
    with torch.no_grad():
        training.loss_of(model, rank, 77)
    state = through_file({"model": model.state_dict(), "engine": engine.state_dict()})
    engine.detach()

    model, opt, engine = fresh(optimizer, update=update)
    steps(model, opt, rank, range(90, 90 + warm))  # also into an engine that has trained already
    model.load_state_dict(state["model"])
    engine.load_state_dict(state["engine"])
    have += steps(model, opt, rank, range(4, 8))
    assert have == want
    same(values(model), values(plain))
    same_optimizer(engine.state_dict()["optimizer"], plain_opt.state_dict())
    engine.detach()


@both_modes
@pytest.mark.parametrize("warm", [0, 1, 3])
def test_saved_and_resumed_training_equals_uninterrupted_training(pool2, update, warm):
    pool2.run(resumed, update, ADAM, warm)


@both_modes
@pytest.mark.parametrize("optimizer", [(optim.NAdam, {"lr": 0.01}), (optim.ASGD, {"lr": 0.05, "t0": 2}), training.SGD])
def test_every_kind_of_state_is_resumed(pool2, update, optimizer):
    pool2.run(resumed, update, optimizer, 3)


def from_plain(rank, world, update, when):
    """A plain optimizer's state goes in before attach, before the first step, or later."""
    plain, plain_opt = training.build("Mlp", ADAM, {})
    steps(plain, plain_opt, rank, range(3))
    state = through_file({"model": plain.module.state_dict(), "optimizer": plain_opt.state_dict()})
    steps(plain, plain_opt, rank, range(3, 6))

    torch.manual_seed(99)
    model = DDP(training.models.Mlp().to(place()))
    opt = ADAM[0](model.parameters(), **ADAM[1])
    if when == "before attach":
        model.module.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
    engine = dear.attach(model, opt, update=update, **SMALL)
    if when == "later":
        steps(model, opt, rank, range(90, 93))
    if when != "before attach":
        model.module.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])  # the optimizer's own method, too
    steps(model, opt, rank, range(3, 6))
    same(values(model), values(plain))
    same_optimizer(engine.state_dict()["optimizer"], plain_opt.state_dict())
    engine.detach()
    same_optimizer(opt.state_dict(), plain_opt.state_dict())


@both_modes
@pytest.mark.parametrize("when", ["before attach", "after attach", "later"])
def test_a_plain_optimizers_state_is_taken_over(pool2, update, when):
    pool2.run(from_plain, update, when)


def save_for_others(rank, world, update, path):
    model, opt = training.build("Mlp", ADAM, {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    steps(model, opt, rank, range(4))
    state = {"model": model.module.state_dict(), "engine": engine.state_dict()}
    if rank == 0:
        torch.save(state, path)
    engine.detach()


def resume_from_others(rank, world, update, path):
    """Compared with plain DDP, resumed likewise."""
    state = torch.load(path)
    plain, plain_opt = training.build("Mlp", ADAM, {})
    plain.module.load_state_dict(state["model"])
    plain_opt.load_state_dict(state["engine"]["optimizer"])
    model, opt, engine = fresh(ADAM, update=update)
    model.module.load_state_dict(state["model"])
    engine.load_state_dict(torch.load(path)["engine"])  # torch's load_state_dict keeps the tensors it is given
    for number in range(4, 8):
        training.plain_step(plain, plain_opt, rank, number)
        training.plain_step(model, opt, rank, number)
    have, want = values(model), values(plain)
    for name in want:
        torch.testing.assert_close(have[name], want[name])
    engine.detach()


@both_modes
@pytest.mark.parametrize("change", ["2 to 4", "4 to 2"])
def test_a_job_resumes_at_another_world_size(pool2, pool4, update, change, tmp_path):
    before, after = (pool2, pool4) if change == "2 to 4" else (pool4, pool2)
    before.run(save_for_others, update, str(tmp_path / "state.pt"))
    after.run(resume_from_others, update, str(tmp_path / "state.pt"))


def in_and_out(rank, world, first, second):
    """Plain, attached, plain, attached in the other mode, plain: as if nothing had ever been attached."""
    plain, plain_opt = training.build("Mlp", ADAM, {})
    model, opt = training.build("Mlp", ADAM, {})
    number = 0
    for mode in (None, first, None, second, None):
        engine = dear.attach(model, opt, update=mode, **SMALL) if mode else None
        for step in range(number, number + 4):
            want = training.plain_step(plain, plain_opt, rank, step)
            assert training.plain_step(model, opt, rank, step) == want
        number += 4
        if engine:
            engine.detach()
            engine.detach()  # nothing more happens
        same(values(model), values(plain))
        same_optimizer(opt.state_dict(), plain_opt.state_dict())
        assert not [name for name in vars(model.module) if name in ("__deepcopy__", "named_parameters", "_apply")]


@pytest.mark.parametrize(("first", "second"), [("sharded", "replicated"), ("replicated", "sharded")])
def test_attach_and_detach_in_the_middle_of_training(pool2, first, second):
    pool2.run(in_and_out, first, second)


def in_mid_step(rank, world, update):
    """detach() between backward and step: the averaged gradients are in .grad, and step uses them."""
    plain, plain_opt = training.build("Mlp", ADAM, {})
    model, opt = training.build("Mlp", ADAM, {})
    with dear.attach(model, opt, update=update, **SMALL):
        for step in range(3):
            training.plain_step(plain, plain_opt, rank, step)
            training.plain_step(model, opt, rank, step)
        training.loss_of(plain, rank, 3).backward()
        training.loss_of(model, rank, 3).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad) and type(mine.grad) is torch.Tensor
    for one in (opt, plain_opt):
        one.step()
        one.zero_grad()
    steps(plain, plain_opt, rank, range(4, 7))
    steps(model, opt, rank, range(4, 7))
    same(values(model), values(plain))


@both_modes
def test_detach_between_backward_and_step_keeps_the_gradients(pool2, update):
    pool2.run(in_mid_step, update)


def refused_export(rank, world):
    model, opt, engine = fresh(update="sharded")
    steps(model, opt, rank, range(3))
    with pytest.raises(RuntimeError, match=r"call engine.state_dict\(\) on every rank"):
        opt.state_dict()
    with pytest.raises(KeyError, match=r"pass what engine\.state_dict"):
        engine.load_state_dict(engine.state_dict()["optimizer"])
    steps(model, opt, rank, range(3, 5))
    engine.detach()
    opt.state_dict()


def test_a_part_of_the_state_is_never_taken_for_all_of_it(pool2):
    pool2.run(refused_export)


def recapped(rank, world, update):
    plain, plain_opt = training.build("Mlp", ADAM, {})
    model, opt = training.build("Mlp", ADAM, {})
    engine = dear.attach(model, opt, update=update, bucket_cap_mb=0.0005)
    groups = set()
    for step, cap in enumerate([0.002, 0.002, 0.002, 0.02, 0.0001, 25, 0.004, 0.002]):
        engine.bucket_cap_mb = cap
        assert engine.bucket_cap_mb == pytest.approx(cap, rel=0.01)
        training.plain_step(plain, plain_opt, rank, step)
        training.plain_step(model, opt, rank, step)
        groups.add(engine.stats()["fusion_groups"])
    assert len(groups) >= 2, "the fusion groups never changed"
    same(values(model), values(plain))
    training.loss_of(model, rank, 8).backward()
    with pytest.raises(RuntimeError, match="between steps only"):
        engine.bucket_cap_mb = 1
    opt.step()
    engine.detach()


@both_modes
def test_the_size_of_fusion_groups_changes_between_steps(pool2, update):
    pool2.run(recapped, update)


def state_bytes(rank, world, update):
    model, opt = training.build("Mlp", (optim.Adam, {"lr": 0.01}), {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    steps(model, opt, rank, range(3))
    buckets = [flat.numel() for flat in engine._attached.layout.full]
    numbers = [torch.zeros(1) for _ in range(world)]
    dist.all_gather(numbers, torch.tensor([float(engine.stats()["optimizer_state_bytes"])]))
    engine.detach()
    # Two moments of 4 bytes per element, and 4 bytes for the step of each run of elements or parameter.
    full, runs = 2 * 4 * sum(buckets), 4 * 6
    if update == "replicated":
        return numbers == [full + runs] * world
    padded = sum(2 * 4 * -(-numel // world) for numel in buckets)
    return all(number <= padded + runs for number in numbers) and full <= sum(numbers) <= full + world * runs


@both_modes
def test_optimizer_state_per_rank_is_divided_by_the_world_size(pool2, pool4, update):
    for pool in (pool2, pool4):
        assert all(pool.run(state_bytes, update))


def two_at_once(rank, world):
    """Two engines in one process, one of each mode, whose steps interleave."""

    def run(attached):
        pairs = [training.build(name, ADAM, {}) for name in ("Mlp", "Tied")]
        modes = ("sharded", "replicated")
        engines = [dear.attach(*p, update=m, **SMALL) for p, m in zip(pairs, modes, strict=True)] if attached else []
        for step in range(5):
            losses = [training.loss_of(model, rank, step) for model, _ in pairs]
            for loss in losses:
                loss.backward()
            for _, opt in pairs:
                opt.step()
                opt.zero_grad()
        found = [values(model) for model, _ in pairs]
        for engine in engines:
            engine.detach()
        return found

    for have, want in zip(run(True), run(False), strict=True):
        same(have, want)


def test_two_engines_at_once(pool2):
    pool2.run(two_at_once)


def in_part_of_the_world(rank, world, update):
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    mine = groups[rank % 2]
    torch.manual_seed(rank % 2)
    start = training.models.Mlp()

    def run(attached):
        net = training.models.Mlp()
        net.load_state_dict(start.state_dict())
        model = DDP(net, process_group=mine)
        opt = ADAM[0](net.parameters(), **ADAM[1])
        engine = dear.attach(model, opt, update=update, **SMALL) if attached else None
        steps(model, opt, rank, range(5))
        if engine:
            state = engine.state_dict()["optimizer"]
            engine.detach()
            same_optimizer(opt.state_dict(), state)
        return values(model)

    same(run(True), run(False))


@both_modes
def test_a_process_group_that_is_part_of_the_world(pool4, update):
    pool4.run(in_part_of_the_world, update)


def replace_storage(layers):
    for layer in layers:
        for param in layer.parameters():
            param.data = param.data.clone() * 1.5


def other_storage(rank, world, update):
    """Somebody gives parameters another storage, before the forward pass or between backward and step."""
    plain, plain_opt = training.build("Mlp", ADAM, {})
    model, opt = training.build("Mlp", ADAM, {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    for number in range(9):
        engine.synchronize()  # whether .data may be read is the user's to know
        for target, optimizer in ((plain, plain_opt), (model, opt)):
            layers = [target.module.first, target.module.last] if number >= 3 else []
            if number % 3 == 0:
                replace_storage(layers)
            training.loss_of(target, rank, number).backward()
            if number % 3 == 1:
                replace_storage(layers)
            optimizer.step()
            optimizer.zero_grad()
    same(values(model), values(plain))
    with pytest.raises(RuntimeError, match="leave assign=True out"):
        model.load_state_dict(plain.state_dict(), assign=True)
    training.plain_step(plain, plain_opt, rank, 20)
    training.plain_step(model, opt, rank, 20)
    same(values(model), values(plain))
    engine.detach()


@both_modes
def test_parameters_whose_storage_is_replaced(pool2, update):
    pool2.run(other_storage, update)


class WithEmpty(nn.Module):
    """A parameter without elements, and one of no dimension."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 8)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.first(x) * self.scale + self.empty.sum()


def with_empty(rank, world, update):
    def run(attached):
        torch.manual_seed(0)
        model = DDP(WithEmpty())
        opt = ADAM[0](model.parameters(), **ADAM[1])
        engine = dear.attach(model, opt, update=update, bucket_cap_mb=0.0001) if attached else None
        steps(model, opt, rank, range(5))
        state = engine.state_dict()["optimizer"] if engine else opt.state_dict()
        found = values(model)
        if engine:
            engine.load_state_dict({"optimizer": state})
            engine.detach()
            same_optimizer(opt.state_dict(), state)
        return found, state

    (have, state), (want, plain_state) = run(True), run(False)
    same(have, want)
    state["state"].pop(0, None), plain_state["state"].pop(0, None)
    assert state["state"].keys() >= {1, 2}


@both_modes
def test_parameters_of_no_elements_and_of_no_dimension(pool2, update):
    pool2.run(with_empty, update)
