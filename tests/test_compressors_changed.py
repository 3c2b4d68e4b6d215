"""A rank or a density that is assigned between two steps counts from the next one, as if a list had said so before."""

import copy

import pytest
import torch
from compressing import SEVERAL_BUCKETS, SHAPES, Prescribed, Sometimes, attach, backward, gradients, kept
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear

LOW_RANK = {"acp": compress.ACPSGD, "power": compress.PowerSGD, "local": compress.LocalPowerSGD}
VALUES = {**dict.fromkeys(LOW_RANK, (8, 2, 5)), "topk": (0.2, 0.02, 0.1), "threshold": (0.9, 0.5, 0.8)}
OPTION = {**dict.fromkeys(LOW_RANK, "rank"), "topk": "density", "threshold": "density"}
EVERY = 3  # steps: an even number of ACP-SGD's would hide which factor is whose turn


def make(kind, value):
    if kind in LOW_RANK:
        return LOW_RANK[kind](rank=value)
    more = {"selection": "threshold", "min_compression_ratio": 0.1} if kind == "threshold" else {}
    return compress.TopK(density=value, **more)


def listed(kind):
    return [(EVERY * index, value) for index, value in enumerate(VALUES[kind])]


def under_the_hook(compressor):
    model = attach(compressor)
    return lambda rank, step: backward(model, gradients(rank, step))


def under_the_schedule(compressor):
    model = DDP(Prescribed().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dear.attach(model, optimizer, compressor=compressor)

    def step(rank, step, between=lambda: None):
        optimizer.zero_grad()
        model({name: grad.to(place()) for name, grad in gradients(rank, step).items()}).backward()
        between()
        optimizer.step()
        engine.synchronize()
        return {name: param.grad.clone() for name, param in model.module.named_parameters()}

    return step


def assigned(rank, world, kind, use):
    planned, changed = make(kind, listed(kind)), make(kind, VALUES[kind][0])
    expected, found = use(planned), use(changed)
    for step in range(3 * EVERY):
        if step % EVERY == 0:
            setattr(changed, OPTION[kind], VALUES[kind][step // EVERY])
        right, have = expected(rank, step), found(rank, step)
        for name in SHAPES:
            assert torch.equal(have[name], right[name]), (kind, step, name)
        assert changed.stats()["bytes_sent"] == planned.stats()["bytes_sent"], step
    owed = kept(planned)
    assert owed and all(torch.equal(error, owed[name]) for name, error in kept(changed).items())


@pytest.mark.parametrize("use", [under_the_hook, under_the_schedule])
@pytest.mark.parametrize("kind", VALUES)
def test_an_assigned_value_counts_from_the_next_step(pool2, kind, use):
    pool2.run(assigned, kind, use)


def between_backward_and_step(rank, world):
    """As where the norm of the gradient decides."""
    planned, changed = (make("power", value) for value in (listed("power"), VALUES["power"][0]))
    expected, found = under_the_schedule(planned), under_the_schedule(changed)
    for step in range(2 * EVERY):
        changes = step == EVERY - 1
        right = expected(rank, step)
        have = found(rank, step, lambda: setattr(changed, "rank", VALUES["power"][1]) if changes else None)  # noqa: B023
        assert all(torch.equal(have[name], right[name]) for name in SHAPES), step


def test_a_value_may_be_assigned_between_backward_and_step(pool2):
    pool2.run(between_backward_and_step)


def refused(rank, world):
    compressor = compress.PowerSGD(rank=4)
    model = attach(compressor)
    backward(model, gradients(rank, 0))
    with pytest.raises(ValueError, match="rank must be"):
        compressor.rank = 0
    assert compressor.rank == 4
    before = backward(model, gradients(rank, 1))
    assert all(torch.isfinite(grad).all() for grad in before.values())


def test_a_value_that_cannot_be_leaves_the_one_that_was(pool2):
    pool2.run(refused)


def unequal(rank, world):
    compressor = compress.PowerSGD(rank=4)
    model = attach(compressor)
    backward(model, gradients(rank, 0))
    compressor.rank = 4 + rank
    with pytest.raises(ValueError, match=r"disagree on the compressor's rank \(4 and 5\)"):
        backward(model, gradients(rank, 1))


def test_ranks_that_disagree_are_told(pool2):
    pool2.run(unequal)


class Spoilt(Prescribed):
    """With one element of one gradient NaN, where that is asked for."""

    def forward(self, grads, spoil=False):
        return super().forward(grads) + (self.bias[0] * float("nan") if spoil else 0.0)


def spoilt_under_the_schedule(compressor, rank):
    """The model, its optimizer and engine, and a backward pass of this rank."""
    model = DDP(Spoilt().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dear.attach(model, optimizer, compressor=compressor)

    def backward_of(step, spoil):
        optimizer.zero_grad()
        model({name: grad.to(place()) for name, grad in gradients(rank, step).items()}, spoil).backward()

    return model, optimizer, engine, backward_of


def under_way(rank, world, how, policy):
    """What is left to be done of a step is not lost where something is assigned, or loaded, before step()."""
    compressor = compress.PowerSGD(rank=4, nonfinite=policy)
    model, optimizer, engine, backward_of = spoilt_under_the_schedule(compressor, rank)

    def interfere():
        if how == "assigned":
            compressor.rank = 6
        else:
            compressor.load_state_dict(compressor.state_dict())

    for step in range(2):
        backward_of(step, spoil=False)
        optimizer.step()
    engine.synchronize()
    before = {name: param.detach().clone() for name, param in model.module.named_parameters()}
    backward_of(2, spoil=rank == 1)
    if policy == "raise" and how == "assigned":
        with pytest.raises(RuntimeError, match="is not finite"):
            interfere()
        return
    interfere()
    optimizer.step()
    engine.synchronize()
    for name, param in model.module.named_parameters():
        if policy != "propagate":
            assert torch.equal(param, before[name]), name
        else:
            assert param.isnan().all(), name  # they are one bucket
    engine.detach()


@pytest.mark.parametrize("policy", ["skip", "raise", "propagate"])
@pytest.mark.parametrize("how", ["assigned", "loaded"])
def test_a_gradient_that_is_not_finite_is_seen_all_the_same(pool2, how, policy):
    pool2.run(under_way, how, policy)


def unused_under_way(rank, world):
    """What a step compressed for parameters that no rank has used goes back to the error feedback."""
    compressor = compress.PowerSGD(rank=2)
    model = DDP(Sometimes().to(place()), find_unused_parameters=True, **SEVERAL_BUCKETS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dear.attach(model, optimizer, compressor=compressor)
    used = [name for name in SHAPES if name != "second"]
    for step in range(4):
        names = used if step == 2 else list(SHAPES)
        owed = kept(compressor).get("second")
        optimizer.zero_grad()
        model({name: gradients(rank, step)[name].to(place()) for name in names}).backward()
        if step == 2:
            compressor.rank = 3
        optimizer.step()
        engine.synchronize()
        if step == 2:
            torch.testing.assert_close(kept(compressor)["second"], owed, rtol=0, atol=1e-5)  # it is in float32
    engine.detach()


def test_results_for_unused_parameters_are_kept(pool2):
    pool2.run(unused_under_way)


def warmed_up(rank, world):
    """The end of a warm-up is seen, however often something is assigned."""
    compressor = compress.PowerSGD(rank=2, start_step="warmup")
    model = DDP(Prescribed().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 3))
    engine = dear.attach(model, optimizer, compressor=compressor)
    compressed = []
    for step in range(8):
        optimizer.zero_grad()
        model({name: grad.to(place()) for name, grad in gradients(rank, step).items()}).backward()
        compressor.rank = 2 + step % 2
        optimizer.step()
        scheduler.step()
        compressed.append(compressor.stats()["error_norm"] > 0)
    assert compressed == [step >= 5 for step in range(8)], compressed
    engine.detach()


def test_a_warmup_ends(pool2):
    pool2.run(warmed_up)


def read_once(rank, world):
    """What would change nothing is refused, and only then; a subclass's own attributes are its own business."""

    class Own(compress.TopK):
        def __init__(self, hot: float, **options: object) -> None:
            super().__init__(**options)
            self.hot = hot

    for made, names, never in (
        (compress.PowerSGD(), ("nonfinite", "error_feedback"), ("factor_dtype", "rank_of", "exempt", "start_step")),
        (compress.Dense(torch.int8), ("min_compression_ratio",), ("dtype", "scale", "start_dtype")),
        (compress.SignSGD(), ("vote",), ()),
        (Own(1.0), ("selection", "slack", "nonfinite"), ()),
    ):
        for name in names:
            setattr(made, name, getattr(made, name))  # before it is in use
        model = attach(made)
        backward(model, gradients(rank, 0))
        for name in names:
            with pytest.raises(AttributeError, match=f"{name} is read as a compressor begins to work"):
                setattr(made, name, getattr(made, name))
        for name in never:
            with pytest.raises(AttributeError, match=f"{name} is read as a compressor is made"):
                setattr(made, name, getattr(made, name))
        if isinstance(made, Own):
            made.hot = 2.0
            made.density = 0.02
        made.part_numel = 10_000
        backward(model, gradients(rank, 1))


def test_options_that_are_read_once_cannot_be_assigned_later(pool2):
    pool2.run(read_once)


def with_another_group(rank, world):
    """A rank that was assigned counts also where the optimizer's groups change before the next backward pass."""
    compressor = compress.PowerSGD(rank=2)
    model = DDP(Prescribed().to(place()))
    last, *first = reversed(list(model.parameters()))
    last.requires_grad_(True)
    optimizer = torch.optim.SGD(first, lr=0.1)
    engine = dear.attach(model, optimizer, compressor=compressor)
    sent = []
    for step in range(4):
        optimizer.zero_grad()
        model({name: grad.to(place()) for name, grad in gradients(rank, step).items()}).backward()
        optimizer.step()
        sent.append(compressor.stats()["bytes_sent"])
        if step == 1:
            compressor.rank = 6
            optimizer.add_param_group({"params": [last], "lr": 0.05})
    assert sent[3] > 1.5 * sent[1], sent
    state = compressor.state_dict()
    assert {name: tuple(p.shape)[1] for name, (p, _) in state["named"].items()}["first"] == 6
    engine.detach()


def test_an_assigned_rank_counts_beside_a_new_parameter_group(pool2):
    pool2.run(with_another_group)


def more_than_it_is_worth(rank, world, option):
    """What has error feedback goes on being compressed, so that it gets what it is owed."""
    make, few, many = {
        "rank": (lambda value: compress.PowerSGD(rank=value), 2, 20),  # of a matrix of 20 rows and 900 columns
        "own rank": (lambda value: compress.LocalPowerSGD(rank=value), 2, 20),
        "density": (lambda value: compress.TopK(density=value), 0.02, 0.9),
    }[option]
    compressor = make(few)
    model = attach(compressor)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    norms = []
    for step in range(9):
        if step % 3 == 0:
            setattr(compressor, option.removeprefix("own "), many if step == 3 else few)
        have = backward(model, gradients(rank, step))
        for name in SHAPES:
            given[name] += sum(gradients(r, step)[name].double() for r in range(world)) - world * have[name].double()
        owed = kept(compressor)
        for name, error in owed.items():
            assert (given[name].flatten() - error).abs().max() < 1e-3, (step, name)
        norms.append(owed["wide"].norm())
    assert norms[5] < 0.5 * norms[2], "what was owed is sent while more is"


@pytest.mark.parametrize("option", ["rank", "own rank", "density"])
def test_what_is_owed_is_sent_where_compressing_gains_nothing(pool2, option):
    pool2.run(more_than_it_is_worth, option)


def loaded_after_nan(rank, world):
    """Whoever goes back to a state that was good goes on from there."""
    compressor = compress.PowerSGD(rank=4)
    model, optimizer, engine, backward_of = spoilt_under_the_schedule(compressor, rank)

    backward_of(0, spoil=False)
    optimizer.step()
    good = engine.state_dict()
    found = []
    for spoil in (False, True):
        if spoil:
            backward_of(3, spoil=True)
            engine.load_state_dict(good)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        backward_of(1, spoil=False)
        optimizer.step()
        engine.synchronize()
        found.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_good_state_can_be_loaded_after_one_that_was_not(pool2):
    pool2.run(loaded_after_nan)


# --- and saved ---


def resumed(rank, world, kind, use):
    first, _, last = VALUES[kind]
    saved, again = make(kind, first), make(kind, first)
    through = use(saved)
    for step in range(2 * EVERY):
        if step == EVERY:
            setattr(saved, OPTION[kind], last)
        through(rank, step)
    state = copy.deepcopy(saved.state_dict(gather=True))
    assert state["ranks"][0]["made_with"][OPTION[kind]] == first
    on = use(again)
    for step in range(2):  # which the state undoes
        on(rank, step)
    again.load_state_dict(state)
    assert getattr(again, OPTION[kind]) == last
    for step in range(2 * EVERY, 3 * EVERY):
        right, have = through(rank, step), on(rank, step)
        assert all(torch.equal(have[name], right[name]) for name in SHAPES), step
    assert again.state_dict()["options"] == state["ranks"][rank]["options"]
    assert again.state_dict()["made_with"] == state["ranks"][rank]["made_with"]  # so it resumes again
    as_it_is = make(kind, last)
    as_it_is.load_state_dict(state)  # by a script that says the new value from the start
    with pytest.raises(ValueError, match=r"was saved with the options .* use the same"):
        make(kind, VALUES[kind][1]).load_state_dict(state)


@pytest.mark.parametrize("use", [under_the_hook, under_the_schedule])
@pytest.mark.parametrize("kind", VALUES)
def test_the_same_script_goes_on_with_what_was_assigned(pool2, kind, use):
    pool2.run(resumed, kind, use)


def assigned_at_once(rank, world, kind):
    """As under DDP's own call, where a compressor is at work from the first backward pass on."""
    saved, again = make(kind, VALUES[kind][0]), make(kind, VALUES[kind][0])
    setattr(saved, OPTION[kind], VALUES[kind][2])
    again.load_state_dict(saved.state_dict())
    assert getattr(again, OPTION[kind]) == VALUES[kind][2]


def test_what_was_assigned_before_the_first_step_is_taken_as_well(pool1):
    for kind in ("power", "topk"):
        pool1.run(assigned_at_once, kind)


def assigned_on_one_rank(rank, world):
    compressor = compress.PowerSGD(rank=2)
    under_the_hook(compressor)(rank, 0)
    if rank == 0:
        compressor.rank = 4
    state = compressor.state_dict(gather=True)
    with pytest.raises(ValueError, match=r"ranks of this state were saved with other options .* on every rank alike"):
        compress.PowerSGD(rank=2).load_state_dict(state)


def test_a_state_of_ranks_that_disagree_is_refused(pool2):
    pool2.run(assigned_on_one_rank)
