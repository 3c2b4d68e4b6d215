"""The barrier by itself: one thread finishes a parameter, and all others wait for it."""

import threading

import pytest
import torch

from dear._pending import Barrier, Pending, settle, unguarded

LOOK = 0.3  # seconds in which a reader that does not wait is done; one that waits is not, however long this is
READS = {
    "clone": lambda param: param.clone(),
    "detach": lambda param: param.detach().clone(),
    "data": lambda param: param.data.clone(),
    "list": lambda param: torch.stack([param, param])[0],
    "numpy": lambda param: torch.from_numpy(param.detach().numpy().copy()),
    "settle": lambda param: (settle(param), param.clone())[1],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_other_threads_wait_until_a_parameter_is_finished(read):
    param = torch.nn.Parameter(torch.zeros(3))
    seen = []
    reader = threading.Thread(target=lambda: seen.append(read(param)))

    def finish(group):
        reader.start()
        reader.join(LOOK)
        assert not seen, "the reader did not wait"
        unguarded([param])[0].fill_(1)

    barrier = Barrier()
    barrier.arrive = lambda group: None
    barrier.finish = finish
    barrier.set_groups([[param]])
    barrier.close([0])
    barrier.settle([0])
    reader.join()
    assert torch.equal(seen[0], torch.ones(3))
    assert type(param) is torch.nn.Parameter


def test_many_threads_finish_a_parameter_once():
    finished = []
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(50)]
    barrier = Barrier()
    barrier.arrive = lambda group: None
    barrier.finish = lambda group: (finished.append(group), unguarded([params[group]])[0].fill_(group))
    barrier.set_groups([param] for param in params)
    for _ in range(20):
        finished.clear()
        barrier.close(range(50))
        wrong = []

        def work(wrong=wrong):
            wrong.extend(i for i, param in enumerate(params) if not bool((param == i).all()))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert sorted(finished) == list(range(50))


def test_what_fails_stays_pending():
    param = torch.nn.Parameter(torch.zeros(2))
    fails = [True]

    def finish(group):
        if fails.pop():
            raise RuntimeError("not yet")
        unguarded([param])[0].fill_(1)

    barrier = Barrier()
    barrier.arrive = lambda group: None
    barrier.finish = finish
    barrier.set_groups([[param]])
    barrier.close([0])
    with pytest.raises(RuntimeError, match="not yet"):
        param.sum()
    assert isinstance(param, Pending)
    fails.append(False)
    assert param.sum() == 2
