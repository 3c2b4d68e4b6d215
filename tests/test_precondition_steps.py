"""What preconditioners capture and when, saved state, bytes, and what is refused."""

import weakref

import preconditioning
import pytest
import torch
import torch.nn.functional as F
from place import place
from test_precondition import OPTIONS, OWNED, SGD, plain_backward, same, trained
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import compress
import dear
import precondition
from precondition._capture import Capture
from precondition._factors import Statistics
from precondition._layers import find_layers
from precondition._solvers import Cholesky

MODES = (None, OWNED)


# --- what is captured, in this process ---


def sums_of(net, run):
    """A and G of each layer after ``run(net)``."""
    statistics = Statistics()
    layers = find_layers(net, set(net.parameters()))
    capture = Capture(statistics.add)
    capture.watch(layers)
    run(net)
    capture.release()
    return {layer.name: factors[:2] for layer, factors in statistics.take(layers, None).items()}


def whole(net, x, y):
    F.mse_loss(net(x), y).backward()


def in_two(net, x, y):
    for part in (slice(4), slice(4, None)):
        (F.mse_loss(net(x[part]), y[part]) / 2).backward()


def with_other_passes(net, x, y):
    """Passes that add nothing to gradients, before, between and after."""
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(net(leaf).sum(), leaf)
    net(x)
    net.eval()
    net(x).sum()
    net.train()
    with torch.no_grad():
        net(x)
    whole(net, x, y)
    torch.autograd.grad(net(leaf).sum(), leaf)


def after_a_dropped_batch(net, x, y):
    whole(net, x * 3, y)
    net.zero_grad()
    whole(net, x, y)


def recomputed(use_reentrant):
    def run(net, x, y):
        x = x.clone().requires_grad_()
        F.mse_loss(checkpoint(net, x, use_reentrant=use_reentrant), y).backward()

    return run


@pytest.mark.parametrize("run", [in_two, with_other_passes, after_a_dropped_batch, recomputed(False), recomputed(True)])
def test_what_counts(run):
    x, y = preconditioning.batch(0, 0)
    want = sums_of(preconditioning.build(), lambda net: whole(net, x, y))
    have = sums_of(preconditioning.build(), lambda net: run(net, x, y))
    assert have.keys() == want.keys()
    for name in want:
        for one, other in zip(have[name], want[name], strict=True):
            torch.testing.assert_close(one, other)


def test_inputs_are_not_held_under_checkpointing():
    """What autograd computes again is not kept for a preconditioner either."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    between = []
    inner[1].register_forward_pre_hook(lambda _, args: between.append(weakref.ref(args[0])))
    seen = []
    capture = Capture(lambda layer, x, grad: seen.append(layer.name))
    capture.watch(find_layers(inner, set(inner.parameters())))
    out = checkpoint(inner, torch.randn(2, 4, requires_grad=True), use_reentrant=False)
    assert between[0]() is None
    out.sum().backward()
    assert seen == ["1", "0"]


def test_a_view_that_is_changed_in_place():
    """A linear layer of three dimensions returns a view; relu_ on it rewrites the view's history."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    have = sums_of(net, lambda net: net(x).square().mean().backward())
    net.zero_grad()
    net[1].inplace = False
    want = sums_of(net, lambda net: net(x).square().mean().backward())
    for name in ("0", "2"):
        torch.testing.assert_close(have[name], want[name])


def test_layers_that_are_served():
    class Own(nn.Linear):
        pass

    class Head(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    embedding, tied, own, frozen = nn.Embedding(4, 3), nn.Linear(3, 4), Own(4, 4), nn.Linear(4, 4)
    frozen.requires_grad_(False)
    net = nn.ModuleDict({"e": embedding, "t": tied, "own": own, "f": frozen, "h": Head(tied.weight)})
    trained_params = {param for param in net.parameters() if param.requires_grad}
    assert [layer.name for layer in find_layers(net, trained_params)] == ["own"]


def test_singular_and_extreme_factors_have_finite_inverses():
    solver = Cholesky(1e-30)
    low = torch.ones(1, 6, 6)  # of rank one, and no damping that float32 could see
    big = torch.full((1, 6, 6), 1e30)
    for factors in ((low, low), (big, low), (torch.zeros(1, 6, 6), torch.zeros(1, 6, 6))):
        ((a, g),) = solver.solve([factors[0]], [factors[1]])
        assert a.isfinite().all() and g.isfinite().all()
    assert int(solver.damped_further) > 0
    sound = Cholesky(0.1)
    sound.solve([torch.eye(3)[None]], [torch.eye(2)[None]])
    assert int(sound.damped_further) == 0


# --- among ranks ---


def accumulated(rank, world, attach):
    """Two passes, the first under no_sync(), are one pass over both."""

    def in_two(model, x, y):
        with model.no_sync():
            (F.mse_loss(model(x[:4]), y[:4]) / 2).backward()
        (F.mse_loss(model(x[4:]), y[4:]) / 2).backward()

    have, _ = trained(rank, world, "DPKFAC", attach, OPTIONS, step=in_two)
    want, _ = trained(rank, world, "DPKFAC", attach, OPTIONS)
    same(have, {name: value.cpu() for name, value in want.items()})


def test_accumulation(pool2):
    for attach in MODES:
        pool2.run(accumulated, attach)


def bytes_of(rank, world, kind):
    """Bytes of the gradients' exchanges, of the preconditioner's own, and of the model."""
    sent = []
    for method in (None, getattr(precondition, kind)() if kind else None):
        model = DDP(preconditioning.build().to(place()))
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        engine = dear.attach(model, optimizer, preconditioner=method, **OWNED)
        for number in range(4):
            plain_backward(model, *(each.to(place()) for each in preconditioning.batch(rank, number)))
            optimizer.step()
            optimizer.zero_grad()
        stats = engine.stats()
        sent += [stats["bytes_sent"], stats.get("preconditioner_bytes_sent", 0)]
        engine.detach()
    return sent


def test_dp_kfac_sends_the_bytes_of_an_all_reduce_and_one_number(pool2, pool3):
    for world, pool in ((2, pool2), (3, pool3)):
        told = pool.run(bytes_of, "DPKFAC")
        plain, _, with_it, own = (sum(each) for each in zip(*told, strict=True))
        model = sum(param.nbytes for param in preconditioning.build().parameters())
        assert plain == with_it == 4 * 2 * (world - 1) * model
        assert own == 4 * world * (world - 1) * 8  # kl_clip's, a float64


def test_kfac_sends_its_factors_too(pool2):
    told = pool2.run(bytes_of, "KFAC")
    upper = sum(
        layer.blocks * n * (n + 1) // 2
        for net in [preconditioning.build()]
        for layer in find_layers(net, set(net.parameters()), embeddings=True)
        for n in layer.sizes
    )
    own = sum(each[3] for each in told)
    assert own == 4 * 8 * (upper + len(preconditioning.layers_of(preconditioning.build())) + 2)


def memory_of(rank, world):
    """Only owners hold factors, and capture."""
    model = DDP(preconditioning.build().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    method = precondition.DPKFAC()
    with dear.attach(model, optimizer, preconditioner=method, **OWNED) as engine:
        for number in range(2):
            plain_backward(model, *(each.to(place()) for each in preconditioning.batch(rank, number)))
            optimizer.step()
            optimizer.zero_grad()
        held = [layer.name for layer in method._binding._running]
        watched = [layer.name for layer in method._binding._capture._handles]
        assert sorted(held) == sorted(watched)
        assert engine.stats()["preconditioner_bytes_held"] > 0
        return held


def test_factors_are_on_their_owners_alone(pool2):
    held = [name for names in pool2.run(memory_of) for name in names]
    assert sorted(held) == sorted(preconditioning.layers_of(preconditioning.build()))


def non_finite(rank, world, attach, factor):
    """A batch that is multiplied; optimizer.step() is skipped where that makes nonsense of it, as GradScaler does."""
    model = DDP(preconditioning.build().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    method = precondition.KFAC(inverse_every=1)
    engine = dear.attach(model, optimizer, preconditioner=method, **attach) if attach else None
    if engine is None:
        precondition.register(model, optimizer, method)
    for number in range(4):
        x, y = (each.to(place()) for each in preconditioning.batch(rank, number))
        plain_backward(model, x * factor if number == 1 else x, y)
        if engine is None:
            method.step()
        if number != 1 or factor == factor:
            optimizer.step()
        optimizer.zero_grad()
    stats = engine.stats() if engine else method._binding.stats()
    assert all(value.isfinite().all() for value in model.module.state_dict().values())
    (engine.detach if engine else method.release)()
    return stats["factors_dropped"]


def test_non_finite_statistics_are_dropped_and_counted(pool2):
    for attach in (None, OWNED):
        assert pool2.run(non_finite, attach, 1e200) == [1, 1]  # the squares of the first layer's inputs
        assert pool2.run(non_finite, attach, float("nan")) == [0, 0]  # no step is to use these gradients


def by_hand(rank, world, compressed):
    """step() between backward() and optimizer.step(), under an engine with replicated updates."""
    model = DDP(preconditioning.build().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    method = precondition.DPKFAC(**OPTIONS)
    precondition.register(model, optimizer, method)
    engine = dear.attach(model, optimizer, update="replicated", compressor=compress.Dense() if compressed else None)
    for number in range(8):
        plain_backward(model, *(each.to(place()) for each in preconditioning.batch(rank, number)))
        method.step()
        optimizer.step()
        optimizer.zero_grad()
    have = {name: value.clone() for name, value in model.module.state_dict().items()}
    engine.detach()
    method.release()
    want, _ = trained(rank, world, "DPKFAC", None, OPTIONS)
    same(have, {name: value.cpu() for name, value in want.items()})


def test_step_by_hand_under_replicated_updates(pool2):
    pool2.run(by_hand, False)
    pool2.run(by_hand, True)  # float64 travels dense


def refused(rank, world):
    def fresh():
        model = DDP(preconditioning.build().to(place()))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = fresh()
    method = precondition.DPKFAC()
    for update in ("sharded", "replicated"):
        with pytest.raises(ValueError, match="A preconditioner changes gradients where their owners are"):
            dear.attach(model, optimizer, preconditioner=method, update=update)
    with pytest.raises(ValueError, match="nor has a compressor"):
        dear.attach(model, optimizer, preconditioner=method, compressor=compress.TopK())
    with pytest.raises(TypeError, match="needs a preconditioner, such as"):
        dear.attach(model, optimizer, preconditioner=compress.TopK())
    with pytest.raises(TypeError, match="is a class"):
        dear.attach(model, optimizer, preconditioner=precondition.DPKFAC)
    with pytest.raises(ValueError, match="Ranks 0 and 1 disagree on the preconditioner's damping"):
        dear.attach(model, optimizer, preconditioner=precondition.DPKFAC(damping=0.1 + rank))
    last = model.module.last
    parted = torch.optim.SGD(
        [{"params": [last.bias]}, {"params": [p for p in model.parameters() if p is not last.bias]}]
    )
    with pytest.raises(ValueError, match="The weight and the bias of last are in different groups"):
        dear.attach(model, parted, preconditioner=method)
    with pytest.raises(RuntimeError, match=r"call precondition\.register"):
        method.step()
    with dear.attach(model, optimizer, preconditioner=method):
        other, other_optimizer = fresh()
        with pytest.raises(RuntimeError, match="serves a model already"):
            precondition.register(other, other_optimizer, method)


def partly_optimized(rank, world):
    """What no optimizer updates keeps its gradient."""
    model = DDP(preconditioning.build().to(place()))
    optimizer = torch.optim.SGD(model.module.last.parameters(), lr=0.1)
    method = precondition.KFAC()
    precondition.register(model, optimizer, method)
    plain_backward(model, *(each.to(place()) for each in preconditioning.batch(rank, 0)))
    before = {name: param.grad.clone() for name, param in model.module.named_parameters()}
    method.step()
    changed = {name for name, param in model.module.named_parameters() if not torch.equal(param.grad, before[name])}
    assert changed == {"last.weight", "last.bias"}
    method.release()


def test_layers_of_no_optimizer(pool2):
    pool2.run(partly_optimized)


def test_refusals(pool2):
    pool2.run(refused)
