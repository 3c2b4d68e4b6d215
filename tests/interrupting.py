"""Ctrl-C, for tests of what waits."""

import contextlib
import os
import signal
import threading
import time

import pytest

PATIENCE = 30.0  # seconds, also on a busy machine: what waits looks for signals many times a second


@contextlib.contextmanager
def interrupted():
    """Ctrl-C, pressed again and again until the block has ended with it, which it must in bounded time."""
    over = threading.Event()
    begun = time.monotonic()

    def press():
        while not over.wait(0.3):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        while thread.is_alive():
            over.set()
            with contextlib.suppress(KeyboardInterrupt):
                thread.join()
    took = time.monotonic() - begun
    assert took < PATIENCE, f"Ctrl-C took {took:.0f} s"
