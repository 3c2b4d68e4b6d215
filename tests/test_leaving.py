"""Ctrl-C and fork while an engine or a compressor's hook is at work: waits end, and no child disturbs its parent."""

import gc
import os
import signal
import time

import pytest
import torch
import training
from interrupting import interrupted
from training import SMALL
from workers import WorkerDied, run_workers

import compress
import dear

HOWS = ["sharded", "replicated", "compressed", "hook"]
FATAL = 4  # the step in which a rank stands still


def start(how):
    """A model at work, and what keeps it there."""
    model, opt = training.build("Mlp", training.SGD, {})
    compressor = compress.ACPSGD(rank=2, min_compression_ratio=0.01)
    engine = None
    if how == "hook":
        compress.register(model, compressor)
    elif how == "compressed":
        engine = dear.attach(model, opt, compressor=compressor, **SMALL)
    else:
        engine = dear.attach(model, opt, update=how, **SMALL)
    return {"model": model, "opt": opt, "compressor": compressor, "engine": engine}


def fork_and_drop(job):
    """What a child that drops its copy of the job ends with."""
    gc.collect()  # process groups of earlier tests are the backend's, whose threads a child does not have
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            job.clear()
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trained(rank, how, forking):
    job, codes = start(how), []
    for step in range(6):
        training.plain_step(job["model"], job["opt"], rank, step)
        if forking:
            codes.append(fork_and_drop(job))
    if job["engine"] is not None:
        job["engine"].synchronize()
    return codes, [value.clone() for value in job["model"].module.state_dict().values()]


def forks(rank, world, how):
    _, want = trained(rank, how, forking=False)
    codes, got = trained(rank, how, forking=True)
    assert codes == [0] * 6, codes
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("how", HOWS)
def test_a_forked_child_may_drop_an_engine(pool2, how):
    pool2.run(forks, how)


def stands_still(rank, world, how, heard):
    """Rank 1 stops between two steps until rank 0 has been interrupted, or for longer than rank 0 would wait."""
    job = start(how)
    for step in range(FATAL):
        training.plain_step(job["model"], job["opt"], rank, step)
    if rank == 1:
        while not os.path.exists(heard):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    with interrupted():
        for step in range(FATAL, 100):
            training.plain_step(job["model"], job["opt"], rank, step)
    with open(heard, "w"):
        return True


@pytest.mark.parametrize("how", HOWS)
def test_ctrl_c_ends_the_wait_for_a_rank_that_stands_still(tmp_path, how):
    """The group's timeout is longer than the test may take."""
    outcomes = run_workers(
        stands_still, 2, how, str(tmp_path / "heard"), group_timeout=600, timeout=120, expect_dead={1}
    )
    assert outcomes[0] is True, outcomes
    assert isinstance(outcomes[1], WorkerDied)
