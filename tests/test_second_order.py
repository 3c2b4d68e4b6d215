"""The benchmark of preconditioned training: names of methods, and its tables."""

import io

import pytest
import torch
from rich.console import Console
from torch.optim import sgd

from benchmarks.report import second_order as report
from benchmarks.second_order import memory, show, tuned
from benchmarks.second_order.autoencoder import AUTOENCODER
from benchmarks.second_order.clock import Clock
from benchmarks.second_order.methods import METHODS, parse_method
from benchmarks.second_order.rivals import RIVALS, Rival
from benchmarks.training.strategies import StrategyError
from benchmarks.training.workloads import MissingPackage


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


class Binding:
    """As much of one as a clock wants to know."""

    _reduce = None

    def begin(self):
        self.end()

    def end(self):
        self.seen = self.__dict__.keys() & {"begin", "end"}


def test_inner_calls_are_taken_off_and_all_is_put_back():
    binding, update = Binding(), sgd.sgd
    with Clock() as clock:
        clock.watch(binding)
        binding.begin()
        assert sgd.sgd is not update
    assert binding.seen == {"begin", "end"} and clock.ms(1)["preconditioning"] > 0 and clock.ms(1)["factors"] == 0
    assert sgd.sgd is update and not binding.__dict__.keys() & {"begin", "end"}
    inner, outer = Clock(), Clock()
    nested = outer._timed("preconditioning", outer._timed("factors", lambda: sum(range(200_000))))
    alone = inner._timed("factors", lambda: sum(range(200_000)))
    nested(), alone()
    assert outer.ms(1)["preconditioning"] < outer.ms(1)["factors"]  # all but the call itself is the inner one's


def search(workload="digits"):
    """A cell of a search: SGD is best at 0.2, and Eva at the largest rate that was tried."""
    curves = {"sgd/dear@0.1": [3, 2.5, 2], "sgd/dear@0.2": [3, 2, 1], "sgd/dear@0.4": [3, 9, float("nan")],
              "eva/dear@0.01": [3, 3, 3], "eva/dear@0.02": [3, 0.5, 0.5]}  # fmt: skip
    strategies = [
        {"name": name, "failure": None, "losses": [each for each in losses for _ in range(9)], "held_out_loss": 1.5}
        for name, losses in curves.items()
    ]
    strategies.append({"name": "foof/dear@1", "failure": "it went wrong", "losses": [1.0], "held_out_loss": None})
    return {"plan": {"workload": workload, "batch": 32, "steps": 27}, "workers": 2, "strategies": strategies}


def test_the_best_of_a_search():
    found = tuned.best(search())
    assert found["sgd"].chosen.learning_rate == 0.2 and not found["sgd"].at_an_end and found["sgd"].chosen.steps == 27
    assert found["eva"].chosen.learning_rate == 0.02 and found["eva"].at_an_end and found["eva"].chosen.steps < 27
    assert tuned.best_rates([search(), search("autoencoder")], "digits") == {"sgd": 0.2, "eva": 0.02}
    assert tuned.best_rates([search()], "gpt") == {}
    table = report.losses.search_table(search())
    assert "| `eva` | 0.02 (an end of the grid) |" in table and "| `foof` | 1 | never |" in table


def taken(name, factors, update, exposed=None, **more):
    parts = {"factors": factors, "inversion": [1.0, 1.0], "communication": [2.0, 4.0], "preconditioning": [1.0, 1.0]}
    parts |= {"update": update} | ({"exposed": exposed} if exposed else {})
    return measured(name, 10.0, [1.0] * 20, parts) | more


def test_tables_of_the_page():
    cell = {
        "plan": {"workload": "gpt", "batch": 4}, "workers": 4, "rate": "500mbit",
        "strategies": [
            taken("sgd/ddp", [0.0, 0.0], [1.0, 1.0], [7.0, 9.0]),
            taken("kfac/dear", [30.0, 20.0], [1.0, 1.0]), taken("dpkfac/dear", [5.0, 10.0], [1.0, 1.0], [3.0, 2.0]),
            taken("muon/ddp", [0.0, 0.0], [8.0, 8.0]),
            taken("muon/dear", [0.0, 0.0], [1.0, 2.0], optimizer_state_bytes=[1024, 512]),
        ],
    }  # fmt: skip
    assert "| `kfac/dear` / `dpkfac/dear` | 3.00× |" in report.against_kfac(cell)
    assert "| 0.250 | 0.250 | 0.287 |" in report.update_table(cell)
    assert "| `dpkfac/dear` | 3 | 4 | 7 |" in report.exposed(cell)
    assert "| `dpkfac/dear` | 10 | 1.00× |" in report.steps_table(cell) and "10.00" in report.steps_table(cell)
    cells = [cell | {"network": "lab", "plan": cell["plan"] | {"seed": seed}} for seed in (1, 2)]
    cells[1]["strategies"] = [taken("sgd/ddp", [0.0], [1.0]), taken("muon/ddp", [0.0], [1.0], losses=[2.0] * 20)]
    table = report.losses.losses_table(report.losses.seeded(cells)[0])
    assert "| `sgd/ddp` | 1 (1-1) |" in table and "1 of 2 seeds" in table


def test_memory_is_compared_with_sgd_in_the_same_place():
    def cell(method, held):
        plan = {"method": method, "workload": "gpt", "steps": 4}
        sizes = {"parameter_bytes": [1000, 1000], "held_bytes": held, "peak_bytes": held}
        return {"plan": plan, "workers": 2, "rate": "unlimited", "network": "lab", "failure": None, **sizes}

    cells = [cell("sgd/ddp", [5000, 5000]), cell("sgd/dear", [4000, 3900]), cell("eva/dear", [4005, 4010])]
    assert memory.more_than_sgd(cells[2], cells, "held_bytes") == pytest.approx(0.01)
    assert "| `eva/dear` | 3.91 KiB | 3.92 KiB | 1.0% |" in report.memory_table(cells)


def test_rivals():
    for name in RIVALS:
        assert parse_method(f"{name}/ddp").method == name
        with pytest.raises(StrategyError, match="RIVAL one of kfac-rival"):
            parse_method(f"{name}/dear")
    with pytest.raises(MissingPackage, match="pip install nothing"):
        Rival("nothing", "there.is.nothing", 0.1, lambda *_: None).build(torch.nn.Linear(1, 1), None)
