"""``compressor="auto"``: what is measured decides, on all ranks alike; training is the same all the while."""

from __future__ import annotations

import json
import logging
import re
from datetime import timedelta

import auto_instruments
import pytest
import torch
import torch.distributed as dist
import training
from auto_instruments import FAST, SLOW, Prescribed
from torch import optim
from workers import run_workers

import compress
import dear
import precondition
from dear import _C
from planner import auto
from planner.auto import Auto

ADAMW = (optim.AdamW, {"lr": 0.01})
SIZE = auto_instruments.by_size(best=0.002)


def dear_is_faster(setting):
    return 3.0 if setting.update == "ddp" else SIZE(setting.bucket_cap_mb) + (setting.update != "sharded")


def ddp_is_faster(setting):
    return SIZE(setting.bucket_cap_mb) if setting.update == "ddp" else 3.0


def compression_is_faster(setting):
    return 1.0 if setting.compressor is not None else 2.0


def small_groups_are_faster(setting):
    """Above all of the way that training begins with, whose first groups are large."""
    large, small = {"sharded": (3.0, 1.0), "ddp": (2.0, 1.9)}.get(setting.update, (2.2, 1.2))
    return large if setting.bucket_cap_mb > 0.012 else small


def nothing_differs(setting):
    return 1.0


class Heard(logging.Handler):
    """What the library says, for as long as it is entered."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())

    def __enter__(self):
        logger = logging.getLogger("dear")
        self.level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        return self.said

    def __exit__(self, *_):
        logging.getLogger("dear").removeHandler(self)
        logging.getLogger("dear").setLevel(self.level)


def chosen(rank, world, line, takes, steps=auto.MOST + 4, loss=0.0, plan=None, more=None, exact=True, **attach):
    """Trains under auto and plainly; returns the plan, what was said, and the settings of the steps."""
    options = {name: by_rank[rank] for name, by_rank in (more or {}).items()}
    instruments = Prescribed(line, takes if callable(takes) else takes[rank], **options)
    plain, plain_opt = training.build("Mlp", ADAMW, {})
    model, opt = training.build("Mlp", ADAMW, {})
    with Heard() as said:
        engine = dear.attach(model, opt, compressor=Auto(loss, plan, instruments=instruments), **attach)
        for step in range(steps):
            want = training.plain_step(plain, plain_opt, rank, step)
            have = training.plain_step(model, opt, rank, step)
            assert not exact or have == want, f"step {step} is not the same training"
            instruments.step_ends(engine)
    found, compressor = engine.plan, engine.compressor
    if compressor is not None:
        compressed = [one for one in instruments.asked if one.compressor is not None]
        assert compressor.step == len(compressed), "one of another size goes on with the error feedback"
    assert found is None or engine.update == found["update"]
    engine.detach()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert not exact or torch.equal(one, other)
    assert not model.module.first._forward_pre_hooks, "a hook is left on the model"
    return found, said, [(one.update, one.bucket_cap_mb, one.compressor is not None) for one in instruments.asked]


def test_where_the_network_is_slow_the_fastest_dense_way_stays(pool2):
    first, second = pool2.run(chosen, SLOW, dear_is_faster)
    (plan, said, asked), (other, silent, others) = first, second
    assert plan == other and asked == others and not silent, "rank 0 speaks for all"
    assert plan["update"] == "sharded" and plan["compressor"] is None
    assert plan["bucket_cap_mb"] == pytest.approx(0.002, rel=0.5), "the search finds the size"
    assert len(set(asked[auto.MOST :])) == 1, "it ends by itself"
    tried = {update for update, *_ in asked}
    assert "ddp" in tried and len(tried) == auto.TRIED
    assert json.loads(json.dumps(plan)) == plan
    (sentence,) = said
    assert sentence.startswith("auto chose DeAR, sharded") and "with plain DDP 3e+03 ms" in sentence


def test_the_way_that_training_begins_with_is_tried_at_a_better_size(pool2):
    for plan, _, asked in pool2.run(chosen, SLOW, small_groups_are_faster):
        assert asked[0] == ("sharded", 1.0, False), "groups that are one"
        assert plan["update"] == "sharded" and plan["bucket_cap_mb"] < 0.012


def test_where_ddp_hides_its_exchange_decoupling_is_turned_off(pool2):
    for plan, _, asked in pool2.run(chosen, FAST, ddp_is_faster):
        assert plan["update"] == "ddp" and asked[-1][0] == "ddp"
        assert plan["bucket_cap_mb"] == pytest.approx(0.002, rel=0.5)


def test_where_a_loss_is_allowed_a_compressor_may_win(pool2):
    (plan, said, _), _ = pool2.run(chosen, SLOW, compression_is_faster, auto.MOST + 4, 0.01, None, None, False)
    assert plan["compressor"] in compress.losses.within(0.01)
    assert "compress." in said[0]


@pytest.mark.slow
def test_without_a_loss_nothing_lossy_is_tried(pool2):
    for plan, _, asked in pool2.run(chosen, SLOW, compression_is_faster):
        assert plan["compressor"] is None and not any(compressed for *_, compressed in asked)


def test_the_slowest_rank_decides(pool2):
    first, second = pool2.run(chosen, SLOW, [dear_is_faster, lambda_of_ddp])
    assert first[0] == second[0] and first[0]["update"] == "ddp", "DeAR is slow on one rank"


def lambda_of_ddp(setting):
    return 3.05 if setting.update == "ddp" else 9.0


def fixed(rank, world):
    plan, _, asked = chosen(rank, world, SLOW, dear_is_faster, update="replicated", bucket_cap_mb=0.004)
    assert {one[:2] for one in asked} == {("replicated", 0.004)} and plan["update"] == "replicated"


@pytest.mark.slow
def test_what_the_user_gave_stays(pool2):
    pool2.run(fixed)


PLAN = {
    "version": 1, "update": "ddp", "compressor": None, "bucket_cap_mb": 1.0, "seconds": 1.0, "workers": 2,
    "elements": 16 * 37 + 37 + 37 * 37 + 37 + 37 * 8 + 8,
}  # fmt: skip


def test_a_saved_plan_is_followed_at_once(pool2):
    for found, said, asked in pool2.run(chosen, FAST, ddp_is_faster, 12, 0.0, PLAN):
        assert found == PLAN and not said
        assert {update for update, *_ in asked} == {"ddp"}


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ({"workers": 64}, "64 workers"),
        ({"update": "sideways"}, "'sideways' does not serve here"),
        ({"compressor": "zip"}, "its compressor cannot be made"),
        ({"compressor": "sign", "update": "replicated"}, "sign, may lose more than is allowed"),
        ({"bucket_cap_mb": -1}, "must be a number of MiB"),
        ({"version": 0}, "no plan of version 1"),
    ],
)
def test_a_plan_that_lies_is_left_aside(pool2, lie, why):
    (found, said, _), _ = pool2.run(chosen, FAST, nothing_differs, 3, 0.0, PLAN | lie)
    assert found is None
    assert len(said) == 1 and why in said[0] and "another one is chosen" in said[0]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"wrong": ["The times of all_reduce follow no line."] * 2}, "follow no line"),
        ({"skipped": [0, 1]}, "rank 1 has measured other layers"),
        ({"seconds": [0.01, float("inf")]}, "measured inf s of computing"),
        ({"fails": ["", "memory"]}, "rank 1 could not measure its memory (MemoryError: no room for the copy)"),
        ({"fails": ["", "layers"]}, "rank 1 could not measure the profile of the model (OSError: the clock broke)"),
    ],
)
def test_what_cannot_be_measured_leaves_training_as_it_was(pool2, more, why):
    (found, said, asked), _ = pool2.run(chosen, FAST, ddp_is_faster, auto.MOST, 0.0, None, more)
    assert found is None and len({update for update, *_ in asked}) == 1
    assert len(said) == 1 and why in said[0] and "goes on as it did" in said[0]


class Stalling(Prescribed):
    """Rank 1 stalls in the probe until the backend of rank 0 has waited for it in vain."""

    def network(self, group, device, phases, lanes):
        store = dist.distributed_c10d._get_default_store()
        if group.rank() == 1:
            store.wait(["in vain"], timedelta(seconds=100))
        try:
            dist.all_reduce(torch.zeros(4), group=group)
        except RuntimeError:
            store.set("in vain", "")
            raise
        raise AssertionError("the backend has waited")


def stalled(rank, world):
    model, opt = training.build("Mlp", ADAMW, {})
    instruments = Stalling(FAST, nothing_differs)
    engine = dear.attach(model, opt, compressor=Auto(0.0, None, instruments=instruments))
    with pytest.raises(RuntimeError) as raised:
        for step in range(auto.MOST):
            training.plain_step(model, opt, rank, step)
            instruments.step_ends(engine)
    return str(raised.value)


def test_a_rank_that_stalls_in_the_probe_ends_training_by_a_sentence():
    waited, _ = run_workers(stalled, 2, group_timeout=5, timeout=200)
    assert re.fullmatch(
        r"A collective of the backend failed while the network was measured on rank 0, and no peer is known to have "
        r"ended: look for one that has stalled \(.*Timed out waiting 5000ms.*\)\.", waited
    ), waited  # fmt: skip


class Turning:
    """After so many steps, plain DDP becomes the slower one, by far."""

    def __init__(self, after):
        self.left = after

    def __call__(self, setting):
        self.left -= 1
        return (ddp_is_faster if self.left > 0 else dear_is_faster)(setting)


@pytest.mark.slow
def test_when_steps_change_for_a_minute_it_chooses_again(pool2):
    # Steps take 1 s at best: 20 to know that, then looks at 15 of them each, of which 4 must differ.
    steps = auto.MOST + 20 + 30 + 4 * 15 + auto.MOST + 10
    for plan, said, asked in pool2.run(chosen, FAST, Turning(auto.MOST + 50), steps):
        assert asked[auto.MOST + 45][0] == "ddp"
        assert plan["update"] == "sharded" == asked[-1][0]
        assert not said or ["choosing again" in sentence for sentence in said] == [False, True, False]


@pytest.mark.slow
def test_where_choosing_again_fails_the_last_plan_stays(pool2):
    more = {"wrong": ["The times of all_reduce follow no line."] * 2, "probes": [1, 1]}
    steps = auto.MOST + 20 + 30 + 4 * 15 + 20
    for plan, said, asked in pool2.run(chosen, FAST, Turning(auto.MOST + 50), steps, 0.0, None, more):
        assert plan["update"] == "ddp" == asked[-1][0]
        assert not said or ("choosing again" in said[1] and "follow no line" in said[2] and len(said) == 3)


def test_a_single_rank_has_nothing_to_choose(pool1):
    ((plan, said, asked),) = pool1.run(chosen, FAST, nothing_differs, 8)
    assert plan is None and not said and len(set(asked)) == 1


def preconditioned(rank, world):
    """What the user has chosen stays; sizes are tried."""
    results = []
    for chooses in (False, True):
        instruments = Prescribed(SLOW, dear_is_faster)
        model, opt = training.build("Mlp", ADAMW, {})
        chooser = Auto(instruments=instruments) if chooses else None
        engine = dear.attach(model, opt, preconditioner=precondition.Eva(), compressor=chooser)
        for step in range(auto.MOST + 4):
            training.plain_step(model, opt, rank, step)
            if chooses:
                instruments.step_ends(engine)
        if chooses:
            assert engine.plan["update"] == engine.update == "sharded" and engine.preconditioner is not None
            assert {setting.update for setting in instruments.asked} == {"sharded"}
            assert len({setting.bucket_cap_mb for setting in instruments.asked}) > 2
            assert engine.stats()["preconditioned_layers"] == 3
        engine.detach()
        results.append([param.detach().clone() for param in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_preconditioner_stays_and_sizes_are_chosen(pool2):
    pool2.run(preconditioned)


def levelled(rank, world):
    instruments = Prescribed(SLOW, dear_is_faster)
    model, opt = training.build("Mlp", ADAMW, {})
    engine = dear.attach(model, opt, compressor=Auto(instruments=instruments), hierarchy=2)
    lanes = set()
    for step in range(auto.MOST + 4):
        training.plain_step(model, opt, rank, step)
        instruments.step_ends(engine)
        lanes.add(type(engine._attached.gather_lane))
    assert lanes == {_C.TwoLevelLane} and engine.plan["update"] == "sharded"
    assert {"ddp", "sharded"} < {setting.update for setting in instruments.asked}
    engine.detach()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.slow
def test_two_levels_stay(pool4):
    first, *others = pool4.run(levelled)
    for other in others:
        assert all(map(torch.equal, first, other)), "replicas parted"


def refused(rank, world):
    with pytest.raises(ValueError, match=r'loss must be a fraction from 0, such as 0.03, or "3%", not \'much\''):
        compress.auto(loss="much")
    assert Auto("1%").loss == Auto(0.01).loss == 0.01
    model, opt = training.build("Mlp", ADAMW, {})
    with pytest.raises(ValueError, match="disagree on the loss"):
        dear.attach(model, opt, compressor=Auto(0.01 * rank))


def test_refusals(pool2):
    pool2.run(refused)


def apart(rank, world):
    """A plan of replicated updates may give way to sharded ones, which hand parts of the parameters to all."""
    model, opt = training.build("Mlp", ADAMW, {})
    with torch.no_grad():
        model.module.second.weight[3, 4] += 1e-3 * rank
    with pytest.raises(ValueError, match=r"Ranks 0 and 1 disagree on the values of the parameter second\.weight"):
        dear.attach(model, opt, compressor=compress.auto(plan=PLAN | {"update": "replicated"}))


def test_replicas_that_differ_are_refused(pool2):
    pool2.run(apart)


def stopped_clock(rank, world):
    model, opt = training.build("Mlp", ADAMW, {})
    with Heard() as said:
        engine = dear.attach(model, opt, compressor=Auto(instruments=Prescribed(SLOW, nothing_differs)))
        began = engine.update
        for step in range(auto.MOST + 4):
            training.plain_step(model, opt, rank, step)
    assert engine.plan is None and engine.update == began
    engine.detach()
    return [sentence for sentence in said if "no step could be timed" in sentence]


def test_where_no_step_can_be_timed_training_goes_on_as_it_did(pool2):
    first, second = pool2.run(stopped_clock)
    assert first and not second
