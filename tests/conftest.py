"""Fixtures for the whole suite."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from workers import WorkerPool


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C is heard, also where a shell started the suite in the background and has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def pool1() -> Iterator[WorkerPool]:
    """One warm worker process, for a world of one. A pool that no test uses starts none."""
    with WorkerPool(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool2() -> Iterator[WorkerPool]:
    """Two warm worker processes (see workers.py); a failed run restarts them."""
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool3() -> Iterator[WorkerPool]:
    """Three warm worker processes."""
    with WorkerPool(3) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator[WorkerPool]:
    """Four warm worker processes."""
    with WorkerPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def gpu2() -> Iterator[WorkerPool]:
    """Two warm workers on one GPU, with a cuBLAS that computes the same each time."""
    with WorkerPool(2, env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}) as pool:
        yield pool


@pytest.fixture(scope="session")
def gpu4() -> Iterator[WorkerPool]:
    """Four."""
    with WorkerPool(4, env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}) as pool:
        yield pool
