"""What mpirun calls instead of ssh, so that the hosts of the emulated network are hosts to it too.

    mpi_agent.py [-x ...] HOST COMMAND...      runs COMMAND in the network namespace of HOST

Each host also gets a host name of its own, by which MPI tells hosts apart. HOSTS in the environment holds JSON: the
path of each host's namespace, by the host's address.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys

HOSTS = "DEAR_LAB_HOSTS"
CLONE_NEWUTS = 0x04000000
CLONE_NEWNET = 0x40000000


def main() -> None:
    words = sys.argv[1:]
    while words[0].startswith("-"):  # options of ssh
        words.pop(0)
    address, *command = words
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(json.loads(os.environ[HOSTS])[address], os.O_RDONLY)
    if libc.setns(namespace, CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace of {address}")
    socket.sethostname("host-" + address.replace(".", "-"))
    os.execv("/bin/sh", ["sh", "-c", " ".join(command)])


if __name__ == "__main__":
    main()
