"""Where a rank listens: interface lists in gloo's and NCCL's syntax, and names that lead to loopback."""

import re

import pytest

from dear import _address
from dear._address import interfaces, listening_address, named_interface

PRESENT = [
    ("lo", "127.0.0.1"),
    ("lo", "::1"),
    ("docker0", "172.17.0.1"),
    ("eth0", "10.0.0.7"),
    ("eth0", "fd00::7"),
    ("eth01", "10.0.1.7"),
    ("ib0", "10.1.0.7"),
]


@pytest.mark.parametrize(
    ("variable", "value", "address"),
    [
        ("GLOO", "ib0", "10.1.0.7"),
        ("GLOO", "eth0,ib0", "10.0.0.7"),
        ("GLOO", "eth7, eth01", "10.0.1.7"),
        ("GLOO", "lo", "127.0.0.1"),
        ("NCCL", "ib", "10.1.0.7"),
        ("NCCL", "=eth01", "10.0.1.7"),
        ("NCCL", "ib,eth", "10.1.0.7"),
        ("NCCL", "^lo,docker", "10.0.0.7"),
        ("NCCL", "^docker", "10.0.0.7"),
        ("NCCL", "^=eth0,docker0", "10.0.1.7"),
        ("NCCL", "^=lo,eth0", "172.17.0.1"),
    ],
)
def test_interface_lists(variable, value, address):
    assert named_interface({f"{variable}_SOCKET_IFNAME": value}, PRESENT) == address


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("GLOO", "^lo", 'GLOO_SOCKET_IFNAME is "^lo", which is NCCL\'s syntax'),
        ("GLOO", ",", "names no interface"),
        ("NCCL", "=", "names no interface"),
        ("GLOO", "eth", "(there are: lo, docker0, eth0, eth01, ib0)"),
        ("NCCL", "^lo,docker,eth,ib", "which no interface with an address on this host matches"),
    ],
)
def test_interface_lists_that_are_refused(variable, value, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        named_interface({f"{variable}_SOCKET_IFNAME": value}, PRESENT)


def test_gloo_s_variable_goes_first():
    env = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib0"}
    assert named_interface(env, PRESENT) == "10.0.0.7"
    assert named_interface({"GLOO_SOCKET_IFNAME": ""}, PRESENT) is None


def test_this_host_has_a_loopback_interface():
    assert ("lo", "127.0.0.1") in interfaces()


@pytest.mark.parametrize(
    ("of_name", "ways", "master", "address"),
    [
        (["10.0.0.7"], {}, "n0", "10.0.0.7"),
        (["127.0.1.1", "10.0.0.7"], {}, "n0", "10.0.0.7"),
        (["127.0.1.1"], {"n0": "10.0.0.7"}, "n0", "10.0.0.7"),  # Debian, as a rank on another host
        (["127.0.1.1"], {"192.0.2.1": "10.0.0.7"}, "n0", "10.0.0.7"),  # Debian, on the master itself
        (["127.0.1.1"], {"192.0.2.1": "10.0.0.7"}, "127.0.0.1", "127.0.0.1"),  # all ranks are here
        (["127.0.1.1"], {"192.0.2.1": "10.0.0.7"}, "localhost", "127.0.0.1"),
        ([], {"192.0.2.1": "10.0.0.7"}, "", "10.0.0.7"),
        (["127.0.1.1"], {}, "n0", "127.0.0.1"),  # there is no network
    ],
)
def test_a_name_that_leads_to_loopback(monkeypatch, of_name, ways, master, address):
    monkeypatch.setattr(_address, "_addresses_of_name", lambda: of_name)
    monkeypatch.setattr(_address, "outgoing_address", lambda target: ways.get(target[0]))
    assert listening_address({"MASTER_ADDR": master} if master else {}) == address
