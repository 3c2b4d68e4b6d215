"""engine.synchronize() in another thread, as of one that logs or watches, while training goes on."""

import threading
import time

import pytest
import training
from refusing import SMALL, final, same

import dear

STEPS = 200


def watched(rank, world, update):
    want = training.train(rank, "Mlp", steps=STEPS)[1]
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    engine.start_trace()
    ended = threading.Event()
    raised = []

    def watch():
        try:
            while not ended.is_set():
                engine.synchronize()
                time.sleep(0.0001)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=watch) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for step in range(STEPS):
            training.plain_step(model, opt, rank, step)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not raised, raised
    same(final(model), want)
    events = engine.stop_trace()  # noted by all three threads
    assert len(events) > STEPS and all(event["lane"] and event["end"] >= event["start"] > 0 for event in events)
    moved = [(event["lane"], event["name"], event["start"]) for event in events if event["lane"] != "wait"]
    assert len(set(moved)) == len(moved), "one waiter notes what was moved"
    engine.detach()


@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_other_threads_may_wait(pool2, update):
    pool2.run(watched, update)
