"""A sample of the state machine (see tests/machine): drawn programs, under plain DDP and under the library."""

import functools

import torch
from machine.case import Case, Result
from machine.compare import Rounding, compare, leaves
from machine.generate import generate
from machine.search import Search, run, verdict
from silence import WARM, pieces
from workers import WorkerPool

SEEDS = range(1, 101)


def sample(pool: WorkerPool, seeds: range, least: int, **drawn: int | str) -> None:
    """Runs these cases: none fails, and more than ``least`` are equal."""
    said: list[str] = []
    found = Search(pool, said.append)
    found.over(seeds, functools.partial(generate, **drawn), shrinks=10)
    assert found.counts["equal"] > least, f"most of these programs show nothing: {dict(found.counts)}"
    assert not said, "\n".join(said)


def test_whatever_is_drawn_trains_as_plain_ddp_or_is_refused(pool2):
    sample(pool2, SEEDS, len(SEEDS) // 4)


def test_two_optimizers(pool2):
    sample(pool2, range(1, 31), 5, optimizers=2)


def test_another_setting_in_every_step(pool2):
    sample(pool2, range(1, 31), 10, how="switching")


def test_nodes_of_two(pool4):
    sample(pool4, range(1, 16), 5, workers=4)


def test_replicas_are_compared_where_plain_ddp_keeps_them_equal():
    def ended(*noted: tuple[str, str]) -> str:
        return verdict(case, [Result("equal", 1, notes=((0, *each),)) for each in noted]).kind

    case = Case("sharded", program=pieces("note(params[0])"), workers=4)
    assert ended(("a", "b"), ("a", "b")) == "equal"
    assert ended(("a", "b"), ("a", "c")) == "difference"
    assert ended(("a", "b"), ("d", "c")) == "equal", "each rank has its own under plain DDP"


def test_replicas_may_be_said_to_differ_only_where_those_of_plain_ddp_do(pool2):
    program = f"{WARM}\n\ndetach()\n\nwith torch.no_grad(): params[0].add_(rank)\n\nattach()"
    case = Case("sharded", program=pieces(program))
    (outcome,) = run(pool2, [case])
    assert outcome.kind == "refused", outcome
    assert "Ranks 0 and 1 disagree on the values of" in outcome.text

    def said(*values: str) -> list[Result]:
        text, where = "ValueError: Ranks 0 and 1 disagree on the values of it.", "/dear/attaching.py"
        return [Result("error", 4, text, where, (each,)) for each in values]

    assert verdict(case, said("a", "b")).kind == "refused"
    assert verdict(case, said("a", "a")).failed


def attaches_twice(case: Case) -> bool:
    attached = False
    for piece in case.program:
        stays = attached and (case.how == "register" or "detach()" not in piece.code)
        if stays and "attach(" in piece.code:
            return True
        attached = stays or "attach(" in piece.code
    return False


def test_few_programs_attach_while_attached():
    twice = sum(attaches_twice(generate(seed)) for seed in range(2000))
    assert 0 < twice < 20, twice


def test_a_text_of_numbers_is_compared_as_these_are():
    """What rounding may change must not count as another training because it was printed, or put into a list."""

    def noted(values: torch.Tensor, told: object) -> list[tuple[int, object]]:
        return [(0, each) for each in leaves([told, values.tolist(), repr(values)])]

    want = torch.tensor([[9.3972e-05, 0.16291], [-0.31983, 1.0]])
    rounded, stale = want + 1e-7, want * 1.01
    rounding = Rounding(noted(want, 1), noted(want.double(), 1))
    assert compare(noted(rounded, 1), noted(want, 1), 1, rounding) is None
    assert compare(noted(rounded, 1), noted(want, 1), 1) is not None
    assert compare(noted(rounded, 2), noted(want, 1), 1, rounding) is not None
    for part in (slice(0, 2), slice(2, 3)):  # the list, the text
        have, others = noted(stale, 1), noted(want, 1)
        assert compare(have[part], others[part], 1, Rounding(others[part], others[part])) is not None
    broken = want * torch.tensor([1.0, float("nan")])  # what is no number bounds nothing
    rounding = Rounding(noted(broken, 1), noted(broken.double(), 1))
    assert compare(noted(broken + 1e-7, 1), noted(broken, 1), 1, rounding) is None
    assert compare(noted(broken * 1.01, 1), noted(broken, 1), 1, rounding) is not None
    assert compare([(0, "a 1.0")], [(0, "b 1.0")], 1, Rounding([(0, "b 1.0")], [(0, "b 1.0")])) is not None
