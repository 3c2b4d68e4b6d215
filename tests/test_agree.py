"""By which device ranks exchange what they mean to do, where their group has a GPU's backend alone; needs no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dear import _agree


class Group:
    """A process group of one rank, without host tensors."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The device that was current in each exchange of the backend."""
    now, seen = ["cuda:0"], []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        now.append(str(wanted))
        yield
        now.pop()

    def gather(everyone: list[Any], mine: Any, group: Group) -> None:
        seen.append(now[-1])
        everyone[:] = [mine]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(c10d, "_get_process_group_store", lambda group: dist.HashStore())
    monkeypatch.setattr(_agree, "choose_algorithm", lambda group, device, asked: "native")
    return seen


def test_ranks_meet_on_the_models_device_whatever_is_current(current: list[str]) -> None:
    group: Any = Group()
    assert _agree.everyones(group, "it", "a value") == ["it"]
    _agree.meet_on(group, torch.device("cuda:1"))
    assert _agree.agree(group, lambda: {"fact": 1}, "agree") == {"fact": 1}
    _agree.everyones(Group(), "it", "a value")  # another one
    assert current == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_model_on_the_host_changes_no_device(current: list[str]) -> None:
    group: Any = Group()
    _agree.meet_on(group, torch.device("cpu"))
    _agree.everyones(group, "it", "a value")
    assert current == ["cuda:0"]
