"""A switch and N hosts in network namespaces of their own, each port limited to a rate both ways.

The namespaces have no names. Each is held open by a file descriptor of this process (and by the processes that run in
it), so the kernel frees it, its links and its queues when the last of these is gone: nothing can be left behind, not
even by `kill -9`, and any number of networks may exist at once. The switch, too, is in a namespace of its own, so that
nothing of all this is seen by the machine's own network: no address can clash and no firewall rule can interfere.

             host 0                      switch                      host 1
        eth0 10.99.0.1  <---------->  p0  br0  p1  <---------->  eth0 10.99.0.2
        tbf: upload 0                 tbf: download 0, 1         tbf: upload 1
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CLONE_NEWNET = 0x40000000
IFNAME = "eth0"

# A TCP sender hands down packets of up to 64 KiB, to be cut in frames as late as possible, which here is never. tbf
# passes such a packet whole only where its bucket can hold it: 65536 bytes and 46 frame headers, 68.6 kB. With a
# smaller bucket it cuts the packet in software, at several times the CPU cost (which the workers would miss). A larger
# bucket would let that much more through at once after every pause: it stays at the smallest that holds one packet...
MIN_BURST = 72 * 1024  # bytes
# ...unless the rate is so high that the bucket would overflow while the kernel wakes up to refill it (a timer may be
# late by some 100 us), which loses rate. Seen at 5 and 10 Gbit/s: 11% and 18% lost with 72 KiB, none with this.
BURST_SECONDS = 256e-6
# What a port of the switch queues before it drops: 8 ms, at least 1 MiB, as real ones do. Three senders into one port
# share it at its full rate with this.
MIN_QUEUE = 1 << 20  # bytes
QUEUE_SECONDS = 8e-3
# A host waits for its own port and does not drop: more than its sockets ever hand down.
HOST_QUEUE = 64 << 20  # bytes

_libc = ctypes.CDLL(None, use_errno=True)


class NetworkUnavailable(RuntimeError):
    """Network namespaces cannot be had here; the message says why and what to do."""


def why_unavailable() -> str | None:
    """One reason why namespaces cannot be had, or None as far as can be told without trying."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"the programs `ip` and `tc` of iproute2 (not found: {', '.join(missing)})"
    if os.geteuid() != 0:
        hint = "where the system allows it, put `unshare --user --map-root-user --net` before the command"
        return f"root (this is user {os.geteuid()}; {hint})"
    return None


def _unavailable(reason: str) -> NetworkUnavailable:
    return NetworkUnavailable(
        f"The emulated network needs {reason}; without it, use the loopback interface: --network loopback."
    )


class Namespace:
    """One network namespace. Only the calling thread enters it, and what that thread starts meanwhile stays there."""

    def __init__(self) -> None:
        own = _current()
        try:
            _check(_libc.setns(own, CLONE_NEWNET))  # first make sure that there is a way back
            _check(_libc.unshare(CLONE_NEWNET))
            self._fd = _current()
        except PermissionError as error:  # root, but in a container
            os.close(own)
            raise _unavailable("the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN, which this root lacks") from error
        _check(_libc.setns(own, CLONE_NEWNET))
        os.close(own)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @contextmanager
    def inside(self) -> Iterator[None]:
        own = _current()
        _check(_libc.setns(self._fd, CLONE_NEWNET))
        try:
            yield
        finally:
            _check(_libc.setns(own, CLONE_NEWNET))
            os.close(own)

    def configure(self, program: str, *commands: str) -> None:
        """Runs `ip` or `tc` commands in here. Raises RuntimeError with what the program said."""
        with self.inside():
            done = subprocess.run(
                [program, "-batch", "-"], input="\n".join(commands) + "\n", text=True, capture_output=True
            )
        if done.returncode:
            raise RuntimeError(f"`{program}` refused one of {commands}: {done.stderr.strip()}")

    def set(self, name: str, value: str) -> None:
        """Sets net.`name`, as sysctl does."""
        with self.inside(), open(f"/proc/sys/net/{name}", "w") as file:
            file.write(value)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class Network:
    """`hosts` namespaces on one switch. `rate` is in bits per second each way, None for no limit."""

    def __init__(self, hosts: int, rate: float | None = None) -> None:
        """Raises NetworkUnavailable, or ValueError for a number of hosts outside 1 to 250."""
        if not 1 <= hosts <= 250:
            raise ValueError(f"a network of {hosts} hosts is out of range: give 1 to 250")
        reason = why_unavailable()
        if reason:
            raise _unavailable(reason)
        self.hosts: list[Namespace] = []
        self.rate: float | None = None
        self._namespaces: list[Namespace] = []
        try:
            self._build(hosts)
            self.set_rate(rate)
        except BaseException:
            self.close()
            raise

    def _build(self, hosts: int) -> None:
        self._switch = self._new()
        self._switch.configure("ip", "link add br0 type bridge forward_delay 0 mcast_snooping 0", "link set br0 up")
        for index in range(hosts):
            host = self._new()
            self.hosts.append(host)
            self._switch.configure(
                "ip",
                f"link add p{index} type veth peer name {IFNAME} netns {host.path}",
                f"link set p{index} master br0 up",
            )
            host.configure(
                "ip",
                "link set lo up",
                f"link set {IFNAME} up",
                f"address add {self.address(index)}/24 dev {IFNAME}",
            )
            # The machine's own choice may be BBR, which probes: now and then it leaves the link nearly idle for 200 ms.
            # Reno is what every kernel has and lets anyone choose.
            host.set("ipv4/tcp_congestion_control", "reno")

    def _new(self) -> Namespace:
        namespace = Namespace()
        self._namespaces.append(namespace)
        with suppress(FileNotFoundError):  # a kernel without IPv6
            namespace.set("ipv6/conf/all/disable_ipv6", "1")  # or its announcements take room in the queues
        return namespace

    @staticmethod
    def address(index: int) -> str:
        return f"10.99.0.{index + 1}"

    def set_rate(self, rate: float | None) -> None:
        """Changes the rate of every port both ways, also while traffic flows."""
        for index, host in enumerate(self.hosts):
            for namespace, device, queue in ((host, IFNAME, HOST_QUEUE), (self._switch, f"p{index}", MIN_QUEUE)):
                if rate is not None:
                    bytes_per_second = rate / 8
                    burst = max(MIN_BURST, int(bytes_per_second * BURST_SECONDS))
                    queue = max(queue, int(bytes_per_second * QUEUE_SECONDS))
                    limit = f"tbf rate {rate:.0f}bit burst {burst} limit {queue}"
                    namespace.configure("tc", f"qdisc replace dev {device} root {limit}")
                elif self.rate is not None:
                    namespace.configure("tc", f"qdisc del dev {device} root")
        self.rate = rate

    def close(self) -> None:
        """Lets go of the namespaces; each vanishes when its last process has ended."""
        for namespace in self._namespaces:
            namespace.close()
        self._namespaces.clear()
        self.hosts.clear()


def _current() -> int:
    # thread-self: a namespace belongs to the thread, and the caller need not be the main one.
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
