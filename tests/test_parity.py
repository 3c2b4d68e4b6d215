"""Training is the same training: losses and parameters equal plain DDP's.

Two workers add two numbers, in either order the same, so there the comparison is bit for bit.
"""

import pytest
import torch
import training
from place import place
from torch import optim
from training import SMALL

MODELS = {
    "Mlp": {},
    "Tied": {},
    "Functional": {},
    "Attention": {},
    "Checkpointed": {},
    "Convolution": {},
    "Frozen": {},
    "MixedTypes": {},
    "Unused": {"find_unused_parameters": True},
    "StaticallyUnused": {"static_graph": True},
}


def all_models(rank, world, update, view, exact):
    for model, options in MODELS.items():
        ddp = {**options, "gradient_as_bucket_view": view}
        attach = {**SMALL, "update": update}
        training.compare(rank, world, model, ddp=ddp, attach=attach, exact=exact)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_models_bit_for_bit(pool2, update, view):
    pool2.run(all_models, update, view, True)


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_models_on_four_ranks_to_rounding(pool4, update):
    pool4.run(all_models, update, True, False)


def by_the_backend(rank, world, update):
    for model in ("Mlp", "Tied"):
        training.compare(rank, world, model, attach={**SMALL, "update": update, "algorithm": "native"})


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_the_backends_own_collectives(pool2, update):
    pool2.run(by_the_backend, update)


def world_of_one(rank, world):
    for update in ("sharded", "replicated"):
        training.compare(rank, world, "Mlp", attach={**SMALL, "update": update})


def test_world_of_one(pool1):
    pool1.run(world_of_one)


OPTIMIZERS = [
    (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (optim.SGD, {"lr": 0.05, "foreach": True, "momentum": 0.5}),
    (optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (optim.AdamW, {"lr": 0.01}),
    (optim.AdamW, {"lr": 0.01, "foreach": False}),
    (optim.AdamW, {"lr": torch.tensor(0.01)}),
    (optim.NAdam, {"lr": 0.01}),
    (optim.RAdam, {"lr": 0.01}),
    (optim.Adamax, {"lr": 0.01}),
    (optim.Adagrad, {"lr": 0.05}),
    (optim.Adadelta, {"lr": 1.0}),
    (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (optim.Rprop, {"lr": 0.01}),
    (optim.ASGD, {"lr": 0.01, "t0": 2}),
]


def optimizers(rank, world, update):
    for optimizer in OPTIMIZERS:
        training.compare(rank, world, "Mlp", optimizer, attach={**SMALL, "update": update})
    sums = training.model_for_sums()
    training.compare(rank, world, sums, (optim.Adafactor, {"lr": 0.01}), attach={**SMALL, "update": "auto"})


@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_every_optimizer(pool2, update):
    pool2.run(optimizers, update)


def fused(rank, world):
    # The vectorised loop rounds its tail differently, and a shard ends elsewhere than a parameter.
    for kind in (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad):
        optimizer = (kind, {"lr": 0.01, "fused": True})
        training.compare(rank, world, "Mlp", optimizer, attach={**SMALL, "update": "sharded"}, exact=False)
        training.compare(rank, world, "Mlp", optimizer, attach={**SMALL, "update": "replicated"})


def test_fused_optimizers(pool2):
    pool2.run(fused)


def lbfgs_step(model, optimizer, rank, step):
    def closure():
        optimizer.zero_grad()
        loss = training.loss_of(model, rank, step)
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def lbfgs(rank, world):
    for update in ("auto", "replicated"):
        training.compare(
            rank, world, "Mlp", (optim.LBFGS, {"lr": 0.1, "max_iter": 3}), attach={**SMALL, "update": update},
            step=lbfgs_step, steps=3,
        )  # fmt: skip


def test_an_optimizer_that_evaluates_again(pool2):
    pool2.run(lbfgs)


def schedule_and_groups(rank, world, update):
    """Parameter groups with options of their own, and a schedule that changes the rate after every step."""

    def run(attach):
        model, _ = training.build("Mlp", training.SGD, {})
        layers = list(model.module.children())
        opt = optim.AdamW(
            [
                {"params": layers[0].parameters(), "lr": 0.02, "weight_decay": 0.3},
                {"params": [layers[1].weight, layers[2].bias], "betas": (0.5, 0.9)},
                {"params": [layers[1].bias, layers[2].weight]},
            ],
            lr=0.005,
        )
        before = optim.lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=8) if attach is None else None
        import dear

        engine = dear.attach(model, opt, **attach) if attach is not None else None
        scheduler = before or optim.lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=8)
        for step in range(7):
            training.plain_step(model, opt, rank, step)
            scheduler.step()
        state = {k: v.clone() for k, v in model.module.state_dict().items()}
        if engine:
            engine.detach()
        return state

    want, have = run(None), run({**SMALL, "update": update})
    for name in want:
        assert torch.equal(want[name], have[name]), name


@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_groups_and_schedules_bit_for_bit(pool2, update):
    pool2.run(schedule_and_groups, update)


def accumulate(model, optimizer, rank, step):
    """Three backward passes, the first two without communication."""
    with model.no_sync():
        for part in range(2):
            training.loss_of(model, rank, 10 * step + part).backward()
    loss = training.loss_of(model, rank, 10 * step + 2)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def twice_reduced(model, optimizer, rank, step):
    """Two backward passes that both communicate: DDP adds the second average to the first."""
    training.loss_of(model, rank, 10 * step).backward()
    loss = training.loss_of(model, rank, 10 * step + 1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def two_forwards(model, optimizer, rank, step):
    """Two forward passes, one backward through both."""
    first, second = training.loss_of(model, rank, step), training.loss_of(model, rank, step + 500)
    loss = first + second
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def zero_in_place(model, optimizer, rank, step):
    """Gradients are kept and set to zero, before backward and not after the step."""
    loss = training.loss_of(model, rank, step)
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
    return loss.item()


def skipped(model, optimizer, rank, step):
    """Every third step is not taken, and its gradients are thrown away."""
    loss = training.loss_of(model, rank, step)
    loss.backward()
    if step % 3 != 1:
        optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def with_evaluation(model, optimizer, rank, step):
    """The inner module is evaluated between steps."""
    training.plain_step(model, optimizer, rank, step)
    model.eval()
    with torch.no_grad():
        inner = training.loss_of(model.module, 0, step + 100).item()
        outer = training.loss_of(model, 0, step + 100).item()
    model.train()
    assert inner == outer
    return inner


LOOPS = [accumulate, twice_reduced, two_forwards, zero_in_place, skipped, with_evaluation]


def loops(rank, world, update, view):
    for loop in LOOPS:
        training.compare(
            rank, world, "Mlp", ddp={"gradient_as_bucket_view": view}, attach={**SMALL, "update": update}, step=loop,
            exact=loop is not twice_reduced,  # DDP adds averages, we average sums
        )  # fmt: skip


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_training_loops(pool2, update, view):
    pool2.run(loops, update, view)


def clipping(model, optimizer, rank, step):
    import dear._ddp

    loss = training.loss_of(model, rank, step)
    loss.backward()
    engine = getattr(model, dear._ddp.ENGINE, None)
    clip = engine.clip_grad_norm_ if engine else lambda m: torch.nn.utils.clip_grad_norm_(model.parameters(), m)
    norm = clip(0.05)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def torch_clipping(model, optimizer, rank, step):
    loss = training.loss_of(model, rank, step)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def clip(rank, world):
    for update in ("sharded", "replicated"):
        training.compare(rank, world, "Mlp", attach={**SMALL, "update": update}, step=clipping, exact=False)
    whole = {**SMALL, "update": "replicated"}
    # A GPU adds up a norm in another order where a gradient begins elsewhere in memory.
    exact = world == 2 and place().type == "cpu"
    training.compare(rank, world, "Mlp", attach=whole, step=torch_clipping, exact=exact)


def test_clipping(pool2, pool4):
    pool2.run(clip)
    pool4.run(clip)


def scaler(rank, world):
    """GradScaler on host tensors, with a step that overflows."""

    def run(attach):
        scale = torch.amp.GradScaler(place().type, init_scale=2.0**10, growth_interval=2)

        def step(model, optimizer, rank, index):
            loss = training.loss_of(model, rank, index) * (1e38 if index == 3 else 1)
            scale.scale(loss).backward()
            scale.step(optimizer)
            scale.update()
            optimizer.zero_grad()
            return scale.get_scale()

        return training.train(rank, "Mlp", attach=attach, step=step)

    want = run(None)
    for update in ("sharded", "replicated"):
        have = run({**SMALL, "update": update})
        assert want[0] == have[0]
        for name in want[1]:
            assert torch.equal(want[1][name], have[1][name]), name


def test_grad_scaler(pool2):
    pool2.run(scaler)
