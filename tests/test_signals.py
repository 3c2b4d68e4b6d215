"""A signal's handler that reads the model while training waits for the network, as one before a preemption does."""

import signal
from datetime import timedelta

import pytest
import torch
import training
from refusing import SMALL, final, same

import compress
import dear
from dear._own_calls import _is_of_backend
from dear._pending import Barrier, unguarded

PATIENCE = timedelta(seconds=100)  # of who waits for the signal; reached where none comes


def saved_while_waiting(rank, world, update, algorithm, compresses=False):
    attach = {"update": update, "algorithm": algorithm, **SMALL}

    def compressor():
        return {"compressor": compress.ACPSGD(rank=2, min_compression_ratio=0.01)} if compresses else {}

    want = training.train(rank, "Mlp", steps=6, attach={**attach, **compressor()} if compresses else None)[1]
    model, opt = training.build("Mlp", training.SGD, {})
    saved = []
    store = torch.distributed.distributed_c10d._get_default_store()
    begun = f"the handler of {update} {algorithm} {compresses} has begun"

    def save(*_):
        store.set(begun, "")
        saved.append(final(model))

    former = signal.signal(signal.SIGALRM, save)
    try:
        with dear.attach(model, opt, **attach, **compressor()):
            for step in range(6):
                loss = training.loss_of(model, rank, step)
                late = step == 3 and rank == 1
                if step == 3 and rank == 0:
                    signal.setitimer(signal.ITIMER_REAL, 0.3)
                if late and update == "replicated":
                    store.wait([begun], PATIENCE)
                loss.backward()
                if late:
                    store.wait([begun], PATIENCE)
                opt.step()
                opt.zero_grad()
            model.module.state_dict()
            same(final(model), want)
    finally:
        signal.signal(signal.SIGALRM, former)
    if rank == 0:
        assert len(saved) == 1


@pytest.mark.parametrize("algorithm", ["ring", "native"])
@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_a_handler_saves_the_model(pool2, update, algorithm):
    pool2.run(saved_while_waiting, update, algorithm)


def test_a_handler_saves_a_model_whose_gradients_are_compressed(pool2):
    pool2.run(saved_while_waiting, "replicated", "ring", True)


def barrier_of(param, arrive, finish):
    barrier = Barrier()
    barrier.arrive, barrier.finish = arrive, finish
    barrier.set_groups([[param]])
    barrier.close([0])
    return barrier


def test_who_reads_while_its_thread_waits_finishes_the_parameter():
    param = torch.nn.Parameter(torch.zeros(3))
    finished, read = [], []

    def arrive(group):  # as a handler does that runs in a wait
        if not read:
            read.append(0)
            read.append(param.sum().item())

    def finish(group):
        finished.append(group)
        unguarded([param])[0].fill_(1)

    barrier_of(param, arrive, finish)
    assert param.sum().item() == 3 and read == [0, 3.0] and finished == [0]
    assert type(param) is torch.nn.Parameter


def test_who_reads_in_the_middle_of_an_update_is_told():
    param = torch.nn.Parameter(torch.zeros(3))
    barrier_of(param, lambda group: None, lambda group: param.sum())
    with pytest.raises(RuntimeError, match=r"while its own update was under way.*: let the handler set a flag"):
        param.sum()


def test_a_handler_in_ddps_broadcast_is_not_its_failure():
    param = torch.nn.Parameter(torch.zeros(3))
    barrier_of(param, lambda group: None, lambda group: param.sum())

    def _sync_buffers(call):  # as DDP calls it
        call()

    with pytest.raises(RuntimeError) as ours:
        _sync_buffers(param.sum)
    assert not _is_of_backend(ours.value)
    with pytest.raises(RuntimeError) as another:
        _sync_buffers(lambda: torch.zeros(2) + torch.zeros(3))
    assert _is_of_backend(another.value)
