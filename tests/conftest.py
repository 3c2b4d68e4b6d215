"""Fixtures for the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from workers import WorkerPool


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
