"""What lanes over NCCL take over from the options of the user's process group, and what not."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dear import _native_groups, collectives
from dear._nccl import lane_options

UNDEFINED = -(2**31)  # as NCCL marks what nobody has set
TIMEOUT = timedelta(seconds=7)


class Config:
    """Of NCCL, as torch shows it; ``net_name`` is freed by NCCL, and must not be set to None."""

    def __init__(self) -> None:
        self.blocking = self.split_share = self.min_ctas = self.max_ctas = self.cga_cluster_size = UNDEFINED
        self.traffic_class = UNDEFINED
        self.__dict__["net_name"] = None
        self.comm_name = None

    def __setattr__(self, name: str, value: Any) -> None:
        assert name != "net_name" or value is not None, "torch would copy a string that is not there"
        super().__setattr__(name, value)


class Options:
    """ProcessGroupNCCL.Options."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self._timeout = timedelta(minutes=10)
        self.split_from, self.split_color = None, -2
        self.global_ranks_in_group: list[int] = []
        self.group_name = ""
        self.config = Config()


class OldOptions(Options):
    """Of an NCCL that cannot be configured."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        super().__init__(is_high_priority_stream)
        del self.config


class Group:
    """A process group of the user's."""

    def __init__(self, options: Any, wrapped: bool = False) -> None:
        backend = SimpleNamespace(options=options)
        self.backend = SimpleNamespace(wrapped_pg=backend) if wrapped else backend

    def _get_backend(self, device: torch.device) -> Any:
        assert device.type == "cuda"
        return self.backend


def users() -> Options:
    """Options of which everything was set."""
    found = Options()
    found._timeout, found.split_from, found.split_color = timedelta(seconds=1), "a parent", 3
    found.global_ranks_in_group, found.group_name = [0, 1], "theirs"
    for name, value in vars(Config()).items():
        setattr(found.config, name, 5 if value == UNDEFINED else "theirs")
    return found


def options_for(group: Any, backend: str = "nccl", options: type = Options) -> Any:
    with mock.patch.object(dist, "ProcessGroupNCCL", SimpleNamespace(Options=options), create=True):
        return lane_options(group, backend, TIMEOUT)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_what_is_taken_over(backend: str, wrapped: bool) -> None:
    """The network and how much of the GPU NCCL takes; neither what is one communicator's alone, nor priorities."""
    theirs = users()
    ours = options_for(Group(theirs, wrapped), backend)
    assert ours.config is not theirs.config
    taken = {name for name, value in vars(ours.config).items() if value == vars(theirs.config)[name]}
    assert taken == {"min_ctas", "max_ctas", "cga_cluster_size", "traffic_class", "net_name"}
    left = {name: value for name, value in vars(ours.config).items() if name not in taken}
    assert left == {"blocking": UNDEFINED, "split_share": UNDEFINED, "comm_name": None}
    assert ours.is_high_priority_stream and ours._timeout == TIMEOUT
    assert (ours.split_from, ours.split_color, ours.global_ranks_in_group, ours.group_name) == (None, -2, [], "")


def test_what_nobody_has_set_stays_so() -> None:
    assert vars(options_for(Group(Options())).config) == vars(Config())


def test_an_old_nccl_has_nothing_to_take_over() -> None:
    for group in (Group(OldOptions()), Group(users()), Group(None)):
        assert options_for(group, options=OldOptions).is_high_priority_stream
    assert vars(options_for(Group(OldOptions())).config) == vars(Config())


@pytest.mark.parametrize("backend", ["gloo", "mpi", "cpu:gloo", "cpu:gloo,cuda:nccl,xpu:xccl"])
def test_other_backends_get_no_options_of_nccls(backend: str) -> None:
    assert options_for(Group(users()), backend) is None


def test_a_torch_without_nccl() -> None:
    with mock.patch.object(dist, "ProcessGroupNCCL", None, create=True):
        assert lane_options(Group(users()), "nccl", TIMEOUT) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "shared", "warns"),
    [
        ("", "", None), ("8", "/pipe", None), ("32", "", None), ("auto", "", None),
        ("1", "", "CUDA_DEVICE_MAX_CONNECTIONS is 1, so"), ("", "/pipe", "is not set under MPS, so"),
    ],
)  # fmt: skip
def test_few_queues_are_told(
    said: str, shared: str, warns: str | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", said)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", shared)
    options_for(Group(users()))
    assert [warns in str(each.message) for each in recwarn if warns] == [True] * bool(warns) and (warns or not recwarn)


@pytest.mark.skipif(not hasattr(dist, "ProcessGroupNCCL"), reason="this torch is built without NCCL")
def test_torchs_own_objects() -> None:
    theirs = dist.ProcessGroupNCCL.Options()
    theirs.config.max_ctas, theirs.config.blocking = 4, 0
    ours = lane_options(Group(theirs), "nccl", TIMEOUT)  # type: ignore[arg-type]
    assert (ours.config.max_ctas, ours.config.min_ctas, ours.config.blocking) == (4, UNDEFINED, UNDEFINED)
    assert ours.config.net_name is None and ours.is_high_priority_stream and ours._timeout == TIMEOUT
    theirs.config.net_name = "Socket"
    assert lane_options(Group(theirs), "nccl", TIMEOUT).config.net_name == "Socket"  # type: ignore[arg-type]


def new_lane(rank: int, world: int) -> None:
    """A lane's group is made with them."""
    group, given = dist.group.WORLD, []
    make = c10d._new_process_group_helper

    def noted(*args: Any, backend_options: Any, **kwargs: Any) -> Any:
        given.append(backend_options)
        return make(*args, **kwargs)

    with (
        mock.patch.object(_native_groups, "lane_options", lambda *args: args),
        mock.patch.object(c10d, "_new_process_group_helper", noted),
    ):
        collectives.make_lane(group, "test", "native", TIMEOUT)
    assert given == [(group, "gloo", TIMEOUT)]


def test_a_lanes_group_is_made_with_them(pool1) -> None:
    pool1.run(new_lane)
