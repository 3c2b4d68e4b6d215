"""The address on which this host's ranks listen for their peers.

Chosen as gloo and NCCL choose theirs: the interface that ``GLOO_SOCKET_IFNAME`` or ``NCCL_SOCKET_IFNAME`` names, else
the address of the host's name. Where that is a loopback address, as Debian's ``127.0.1.1`` in ``/etc/hosts``, and the
master is not named as being on this host, the address from which the master is reached is taken instead.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

__all__ = ["interfaces", "listening_address", "named_interface", "outgoing_address"]

Interface = tuple[str, str]  # name and numeric address
_SIOCGIFADDR = 0x8915
_ANYWHERE = ("192.0.2.1", 9)  # an address of documentation's: nothing is sent there


def listening_address(env: Mapping[str, str]) -> str:
    """The numeric address to listen on.

    Raises:
        ValueError: an interface variable is not understood, or names no interface of this host.
    """
    named = named_interface(env, interfaces())
    if named is not None:
        return named
    for address in _addresses_of_name():
        if not _is_loopback(address):
            return address
    master = env.get("MASTER_ADDR", "")
    if _says_loopback(master):
        return "127.0.0.1"
    to_master = outgoing_address((master, 9)) if master else None
    return to_master or outgoing_address(_ANYWHERE) or "127.0.0.1"


def named_interface(env: Mapping[str, str], present: Iterable[Interface]) -> str | None:
    """The address of the interface that the environment names; None where it names none.

    ``GLOO_SOCKET_IFNAME`` is a list of names, as ``eth0,eth1``. ``NCCL_SOCKET_IFNAME`` is a list of prefixes, ``eth``;
    ``=eth0`` asks for exact names, ``^docker`` for all but these prefixes, and ``^=docker0`` for all but these names.
    Of several the first is taken, loopback last unless it is named.
    """
    name = next((name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if env.get(name)), None)
    if name is None:
        return None
    present, asked = list(present), _Asked.read(name, env[name])
    if asked.excluded:
        left = [one for one in present if not any(asked.matches(one[0], pattern) for pattern in asked.patterns)]
        found = sorted(left, key=lambda interface: _is_loopback(interface[1]))  # stable: the order of the system
    else:
        found = [one for pattern in asked.patterns for one in present if asked.matches(one[0], pattern)]
    if not found:
        names = ", ".join(dict.fromkeys(interface for interface, _ in present)) or "none"
        raise ValueError(
            f'{name} is "{env[name]}", which no interface with an address on this host matches (there are: {names}): '
            "set it to one that `ip addr` lists."
        )
    return found[0][1]


@dataclass(frozen=True)
class _Asked:
    """What a variable says of interfaces."""

    patterns: list[str]
    exact: bool  # they are names, not prefixes
    excluded: bool  # all others are wanted

    @classmethod
    def read(cls, name: str, value: str) -> _Asked:
        is_gloos = name.startswith("GLOO")
        if is_gloos and value[0] in "^=":
            raise ValueError(f'{name} is "{value}", which is NCCL\'s syntax: list exact names, for example eth0,eth1.')
        rest = value.removeprefix("^")
        patterns = [part.strip() for part in rest.removeprefix("=").split(",") if part.strip()]
        if not patterns:
            raise ValueError(f'{name} is "{value}", which names no interface: correct or unset it.')
        return cls(patterns, is_gloos or rest.startswith("="), value.startswith("^"))

    def matches(self, interface: str, pattern: str) -> bool:
        return interface == pattern if self.exact else interface.startswith(pattern)


def interfaces() -> list[Interface]:
    """Every interface of this host with its addresses, IPv4 before IPv6."""
    names = [name for _, name in socket.if_nameindex()]
    found: list[Interface] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, socket.inet_ntoa(answer[20:24])))
    with suppress(OSError), open("/proc/net/if_inet6") as table:
        for line in table:
            digits, _, _, scope, _, name = line.split()
            if scope != "20":  # link-local addresses need to say their interface
                found.append((name, str(IPv6Address(int(digits, 16)))))
    return sorted(found, key=lambda interface: names.index(interface[0]) if interface[0] in names else len(names))


def outgoing_address(target: tuple[str, int]) -> str | None:
    """The address from which ``target`` is reached; None where there is no way, or only loopback's. Sends nothing."""
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(*target, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)
                own = str(probe.getsockname()[0])
                if not _is_loopback(own):
                    return own
    return None


def _addresses_of_name() -> list[str]:
    """Those of the host's name that are this host's."""
    found = []
    with suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind(address)
                found.append(str(address[0]))
    return found


def _is_loopback(address: str) -> bool:
    return ip_address(address.split("%")[0]).is_loopback


def _says_loopback(master: str) -> bool:
    """Whoever wrote this means: all ranks are on this host."""
    if master in ("localhost", "localhost.localdomain"):
        return True
    with suppress(ValueError):
        return ip_address(master).is_loopback
    return False
