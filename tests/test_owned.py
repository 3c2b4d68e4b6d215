"""update="owned": whole parameters on one rank each, and the same training as with plain DDP."""

import models
import owning
import pytest
import torch
import training
from place import place
from test_parity import MODELS
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel as DDP

import dear

SMALL = {"bucket_cap_mb": 0.002, "update": "owned"}
BOTH = ("ring", "native")
ADAFACTOR = (optim.Adafactor, {"lr": 0.01})
FACTORED = (owning.Factored, {"lr": 0.05})


def all_models(rank, world, optimizer, exact):
    for model, ddp in MODELS.items():
        training.compare(rank, world, model, optimizer, ddp=ddp, attach=SMALL, exact=exact)


@pytest.mark.parametrize("optimizer", [ADAFACTOR, training.SGD])
def test_models_bit_for_bit(pool2, optimizer):
    pool2.run(all_models, optimizer, True)


def test_models_to_rounding(pool3, pool4):
    # Adafactor divides gradients by their size, and so makes much of the rounding of those that are almost zero.
    pool3.run(all_models, FACTORED, False)
    pool4.run(all_models, FACTORED, False)
    pool4.run(all_models, training.SGD, False)


OPTIMIZERS = [
    ADAFACTOR,
    (owning.Factored, {}),
    (owning.WholeAdamW, {"lr": 0.01, "amsgrad": True}),
    (owning.muon_with_auxiliary, {}),
    (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
]


def optimizers(rank, world, algorithms):
    for optimizer in OPTIMIZERS:
        model = training.model_for_sums() if optimizer is ADAFACTOR else "Mlp"
        for algorithm in algorithms:
            training.compare(rank, world, model, optimizer, attach={**SMALL, "algorithm": algorithm})


def test_optimizers(pool2):
    pool2.run(optimizers, BOTH)


def world_of_one(rank, world):
    for optimizer in OPTIMIZERS:
        training.compare(rank, world, "Mlp", optimizer, attach=SMALL)


def test_world_of_one(pool1):
    pool1.run(world_of_one)


def wide(rank, world, algorithms):
    """Parameters that are long enough to be parted, several of them to a fusion group."""
    models.Wide = Wide
    for optimizer in OPTIMIZERS:
        for algorithm in algorithms:
            attach = {"update": "owned", "bucket_cap_mb": 0.3, "algorithm": algorithm}
            training.compare(rank, world, "Wide", optimizer, attach=attach)


class Wide(models.Mlp):
    """Matrices of 160 kB in the middle."""

    def __init__(self) -> None:
        super().__init__(200)


def test_wide_models(pool2, pool4):
    pool2.run(wide, BOTH)
    pool4.run(wide_to_rounding)


def wide_to_rounding(rank, world):
    models.Wide = Wide
    for algorithm in BOTH:
        attach = {"update": "owned", "bucket_cap_mb": 0.3, "algorithm": algorithm}
        for optimizer in (FACTORED, (owning.WholeAdamW, {"lr": 0.01}), training.SGD):
            training.compare(rank, world, "Wide", optimizer, attach=attach, exact=False)


class Matrices(nn.Module):
    """Nothing but matrices, which torch's Muon takes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 40, bias=False), nn.Tanh(), nn.Linear(40, 24, bias=False), nn.Linear(24, 8, bias=False)
        )

    def forward(self, x):
        return self.layers(x)


models.Matrices = Matrices


def muon(rank, world, attach):
    models.Matrices = Matrices
    training.compare(rank, world, "Matrices", (optim.Muon, {"lr": 0.02}), attach=attach)


def test_muon_takes_it_by_itself(pool2):
    pool2.run(muon, {"bucket_cap_mb": 0.002})
    pool2.run(muon, {})
    pool2.run(muon, {**SMALL, "overlap_forward": False})


def chosen(rank, world):
    model = Matrices()
    said = []
    for kind in (optim.Muon, optim.Adafactor, owning.Factored, owning.WholeAdamW, optim.AdamW):
        wrapped = DDP(Matrices().to(place()))
        with dear.attach(wrapped, kind(wrapped.parameters(), lr=0.01)) as engine:
            said.append(engine.update)
    assert said == ["owned", "owned", "owned", "owned", "sharded"]

    class Unknown(optim.AdamW):
        pass

    wrapped = DDP(model.to(place()))
    assert dear.attach(wrapped, Unknown(wrapped.parameters())).update == "replicated"


def test_what_is_chosen_for_an_optimizer(pool2):
    pool2.run(chosen)


def share_of_state(rank, world):
    """Each rank has its parameters' state only, and all of them together have each once."""
    model, opt = training.build("Mlp", ADAFACTOR, {})
    training.plain_step(model, opt, rank, 0)
    want = sum(v.nbytes for state in opt.state.values() for v in state.values())
    model, opt = training.build("Mlp", ADAFACTOR, {})
    with dear.attach(model, opt, **SMALL) as engine:
        for step in range(3):
            training.plain_step(model, opt, rank, step)
        stats = engine.stats()
        assert 1.0 <= stats["update_balance"] <= world and engine.update == "owned"
        owned = [segment.places[0].param for segment in engine._update._states.segments]
        assert all(segment.whole for segment in engine._update._states.segments)
        return stats["optimizer_state_bytes"], want, [engine._attached.names[param] for param in owned]


def test_state_is_on_the_owner_alone(pool2, pool3):
    for pool in (pool2, pool3):
        told = pool.run(share_of_state)
        assert sum(mine for mine, _, _ in told) == told[0][1]
        names = [name for _, _, owned in told for name in owned]
        assert len(names) == len(set(names)) == 6


def clipped(rank, world, norm_type):
    def step(model, optimizer, rank, number):
        training.loss_of(model, rank, number).backward()
        engine = getattr(model, "_dear_engine", None)
        clip = engine.clip_grad_norm_ if engine else lambda *a: torch.nn.utils.clip_grad_norm_(model.parameters(), *a)
        norm = clip(0.05, norm_type)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()

    training.compare(rank, world, "Mlp", ADAFACTOR, attach=SMALL, step=step, exact=False)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping(pool2, pool4, norm_type):
    pool2.run(clipped, norm_type)
    pool4.run(clipped, norm_type)


def own_gradients(rank, world):
    """Tensors of the user's own in .grad, of some parameters."""

    def step(model, optimizer, rank, number):
        training.loss_of(model, rank, number).backward()
        generator = torch.Generator().manual_seed(number)
        for param in list(model.parameters())[:3]:
            param.grad = torch.randn(param.shape, generator=generator).to(place())
        optimizer.step()
        optimizer.zero_grad()
        return 0.0

    training.compare(rank, world, "Mlp", ADAFACTOR, attach=SMALL, step=step)


def test_gradients_of_the_users_own(pool2):
    pool2.run(own_gradients)


def bytes_on_the_wire(rank, world, algorithm):
    model, opt = training.build("Mlp", (owning.WholeAdamW, {"lr": 0.01}), {})
    with dear.attach(model, opt, **SMALL, algorithm=algorithm) as engine:
        for step in range(3):
            training.plain_step(model, opt, rank, step)
        engine.synchronize()
        before = engine.stats()["bytes_sent"]
        for step in range(2):
            training.plain_step(model, opt, rank, step)
        engine.synchronize()
        return engine.stats()["bytes_sent"] - before, sum(param.nbytes for param in model.parameters())


@pytest.mark.parametrize("world", [2, 3, 4])
def test_bytes_are_those_of_an_all_reduce(request, world):
    pool = request.getfixturevalue(f"pool{world}")
    for algorithm, padding in (("ring", 0.0), ("native", 0.02)):
        told = pool.run(bytes_on_the_wire, algorithm)
        sent, model = sum(each for each, _ in told) / 2, told[0][1]
        assert 0 <= sent / (2 * (world - 1) * model) - 1 <= padding, algorithm


def move(opt, param, source, target):
    group = opt.param_groups[source]
    group["params"] = [each for each in group["params"] if each is not param]
    opt.param_groups[target]["params"].append(param)


def moved_to_whole(rank, world):
    """Parameters may come into a group that is updated elementwise, and not from there into one of whole ones."""
    model = DDP(training.models.Mlp(width=300).to(place()))
    opt = owning.muon_with_auxiliary(model.parameters())
    big = model.module.second.weight
    move(opt, big, 0, 1)
    dear.attach(model, opt, **SMALL)
    for step in range(2):
        training.plain_step(model, opt, rank, step)
    move(opt, big, 1, 0)
    with pytest.raises(RuntimeError, match=r"The parameter second\.weight came to a group that keeps"):
        training.plain_step(model, opt, rank, 2)
    with pytest.raises(RuntimeError, match=r"The parameter second\.weight came to a group that keeps"):  # and stays
        training.plain_step(model, opt, rank, 2)


def test_a_cut_parameter_cannot_become_whole(pool2):
    pool2.run(moved_to_whole)


def added_later(rank, world):
    """A parameter that joins after the layout was made is whole, and may come to either kind of group."""

    def trained(attach, whole):
        model, _ = training.build("Mlp", training.SGD, {})
        late = model.module.second.weight
        rest = [param for param in model.parameters() if param is not late]
        opt = owning.muon_with_auxiliary(rest)
        engine = dear.attach(model, opt, **SMALL) if attach else None
        for step in range(6):
            if step == 3:
                opt.add_param_group({"params": [late], "use_muon": whole})
            training.plain_step(model, opt, rank, step)
        if engine:
            engine.detach()
        return [param.clone() for param in model.parameters()]

    for whole in (True, False):
        for have, want in zip(trained(True, whole), trained(False, whole), strict=True):
            assert torch.equal(have, want)


def test_a_parameter_that_joins_later(pool2):
    pool2.run(added_later)


def refused(rank, world):
    model, opt = training.build("Mlp", (optim.LBFGS, {}), {})
    with pytest.raises(ValueError, match='update="owned" updates each parameter on its own, and LBFGS'):
        dear.attach(model, opt, update="owned")
    opt = type("Mine", (optim.LBFGS,), {"dear_whole": True})(model.parameters())  # which is not so
    with pytest.raises(ValueError, match='update="owned" updates each parameter on its own, and Mine'):
        dear.attach(model, opt, update="owned")
    import compress

    model, opt = training.build("Mlp", ADAFACTOR, {})
    with pytest.raises(ValueError, match='update="owned" gathers updated parameters'):
        dear.attach(model, opt, update="owned", compressor=compress.ACPSGD())
    with pytest.raises(ValueError, match="an empty list"):
        dear.attach(model, [])


def test_refusals(pool2):
    pool2.run(refused)


class Noisy(optim.SGD):
    """Stochastic gradient Langevin dynamics, roughly."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(torch.randn_like(param), alpha=0.01)


def drawing(rank, world):
    model, opt = training.build("Mlp", (Noisy, {"lr": 0.1}), {})
    engine = dear.attach(model, opt, **SMALL)
    model(models.data(rank, 0)[0].to(place())).square().mean().backward()
    with pytest.raises(RuntimeError, match=r'Noisy\.step\(\) draws random numbers.*use update="replicated"'):
        opt.step()
    engine.detach()


def test_an_optimizer_that_draws_random_numbers(pool2):
    """DDP's replicas draw the same numbers; owners of different parameters cannot."""
    pool2.run(drawing)
