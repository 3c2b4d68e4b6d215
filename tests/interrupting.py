"""Ctrl-C, for tests of what waits."""

import contextlib
import os
import signal
import threading

import pytest


@contextlib.contextmanager
def interrupted():
    """Ctrl-C, pressed again and again until the block has ended with it."""
    over = threading.Event()

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
