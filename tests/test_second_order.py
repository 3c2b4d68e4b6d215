"""The benchmark of preconditioned training: names of methods, and its tables."""

import io

import pytest
from rich.console import Console

from benchmarks.second_order import show
from benchmarks.second_order.autoencoder import AUTOENCODER
from benchmarks.second_order.clock import Clock
from benchmarks.second_order.methods import METHODS, parse_method
from benchmarks.training.strategies import StrategyError


def test_names_of_methods():
    assert parse_method("eva/dear@0.02").learning_rate == 0.02 and parse_method("eva/dear").scheduled
    assert not parse_method("sgd/ddp").scheduled and {"kfac", "dpkfac", "muon"} < METHODS.keys()
    for name in ("eva", "eva/mpi", "other/ddp", "sgd/ddp@0", "sgd/ddp@fast"):
        with pytest.raises(StrategyError, match="the forms are METHOD/ddp"):
            parse_method(name)


def measured(name, ms, losses, parts=None, failure=None):
    block = {"ms": [[ms, ms]], "sent_bytes_per_step": [1000], "cpu_ms_per_step": [ms]}
    return {
        "name": name, "failure": failure, "blocks": [] if failure else [block], "losses": losses, "breakdown": parts,
        "clock_ms": [ms] * len(losses), "payload_bytes_per_step": 1000,
        "optimizer_state_bytes": [4096], "held_out_loss": min(losses, default=None),
    }  # fmt: skip


def test_tables():
    parts = {"factors": 1.0, "inversion": 0.0, "communication": 0.5, "preconditioning": 2.0}
    cell = {
        "plan": {"workload": "digits", "batch": 32}, "workers": 2, "rate": "100mbit",
        "strategies": [
            measured("sgd/ddp@0.1", 10.0, [2.0] * 20 + [1.0] * 20),
            measured("sgd/ddp@0.2", 10.0, [2.0] * 40),
            measured("eva/dear@0.1", 12.0, [1.0] * 40, parts),
            measured("kfac/ddp", 0.0, [], failure="it went wrong"),
        ],
    }  # fmt: skip
    sgd, eva, kfac = show.rows(cell)
    assert (sgd.name, eva.speedup, kfac.failure) == ("sgd/ddp@0.1", pytest.approx(1 / 1.2), "it went wrong")
    assert sgd.seconds_to_loss == pytest.approx(0.29) and eva.seconds_to_loss == pytest.approx(0.012)
    text = io.StringIO()
    show.show(cell, Console(file=text, width=120))
    assert all(each in text.getvalue() for each in ("eva/dear@0.1", "1.200", "communication", "it went wrong"))


def test_autoencoder_reconstructs():
    inputs, targets = AUTOENCODER.data().batch(0, rank=0, world=2, batch=4, seed=1)
    net = AUTOENCODER.build_seeded(1)
    assert net(inputs).shape == targets.shape == (4, 64) and AUTOENCODER.loss(net(inputs), targets) > 0


def test_inner_calls_are_taken_off():
    class Binding:
        class solver:
            pass

        def begin(self):
            self.end()

        def end(self):
            pass

    binding, clock = Binding(), Clock()
    clock.watch(binding)
    binding.begin()
    assert clock.seconds.keys() == {"preconditioning"} and not clock._inside
