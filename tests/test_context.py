"""The order of streams around deferred work, where streams are recorded ones: no device is needed."""

import dataclasses

import torch

from dear._context import StepContext, _on_stream


@dataclasses.dataclass
class Stream:
    """Notes what is asked of it."""

    name: str
    log: list[str]

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.log.append(f"on {self.name}")

    def __exit__(self, *_):
        self.log.append(f"off {self.name}")


def test_deferred_work_comes_between_what_its_reader_did_and_does():
    """The reader has been ordered behind the gradients, on its own stream alone: the step's stream must follow."""
    log = []
    device = torch.device("cpu")
    reader, step = (StepContext(device, stream=Stream(name, log)) for name in ("reader", "step"))
    with _on_stream(step, reader):
        log.append("update")
    assert log == ["step waits for reader", "on step", "update", "off step", "reader waits for step"]


def test_deferred_work_on_the_readers_own_stream_waits_for_nothing():
    log = []
    own = StepContext(torch.device("cpu"), stream=Stream("own", log))
    with _on_stream(own, own):
        log.append("update")
    assert log == ["update"]
