"""A peer that dies or stalls: every other rank gets one clear error within the group's timeout, and can end.

`run_workers` itself demands that survivors exit by themselves, with exit code 0.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import owning
import pytest
import torch
import torch.nn.functional as F
import training
from threads import threads
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import WorkerDied, run_workers

import dear

# The process group's timeout, in seconds, where a peer stalls: longer than a busy machine holds a living rank up.
STALL_TIMEOUT = 10
# Where a peer dies: the others hear of it at once, long before this.
DEATH_TIMEOUT = 100
FATAL = 5  # the step in which it happens: DDP's buckets and our groups have long been settled


def end(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "gone":
        os._exit(7)
    time.sleep(1000)  # stalls


def ends_in_backward(how):
    """A forward hook: backward ends between two layers, while their neighbours' gradients are on their way."""

    def hook(module, args, output):
        output.register_hook(lambda grad: end(how))

    return hook


def gathers_but_one(engine, how):
    """Sharded: ends when all-gathers have been sent, and the last one has not."""
    update = engine._update
    run = update._run

    def run_or_end(optimizer, group):
        if group == engine._attached.order[-1]:
            end(how)
        run(optimizer, group)

    update._run = run_or_end


def train_until(rank, where, how, update, victim):
    """Trains for a hundred steps, unless something happens; the victim ends at its place in step FATAL."""
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(16, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 8)))
    kind = owning.WholeAdamW if update == "owned" else torch.optim.Adam
    opt = kind(model.parameters(), lr=0.01)
    engine = dear.attach(model, opt, update=update, bucket_cap_mb=0.2)
    for step in range(100):
        mine = rank == victim and step == FATAL
        if mine and where == "between":
            end(how)
        x, y = training.models.data(rank, step)
        hidden = model.module[1].register_forward_hook(ends_in_backward(how)) if mine and where == "backward" else None
        loss = F.mse_loss(model(x), y)
        if hidden:
            hidden.remove()
        loss.backward()
        if mine and where == "before step":
            end(how)
        if mine and where == "gather":
            if update != "replicated":
                # Or the last group may be updated while another is being reduced.
                engine._attached.scheduler.synchronize()
                gathers_but_one(engine, how)
            else:
                opt.step()
                end(how)
        opt.step()
        opt.zero_grad()
    raise AssertionError("nothing happened")


def survive(rank, world, where, how, update, victim):
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        train_until(rank, where, how, update, victim)
    return str(caught.value), time.monotonic() - start, threading.active_count()


CASES = [  # world, victim, where, how, update
    (2, 1, "backward", "killed", "sharded"),
    (2, 0, "backward", "killed", "replicated"),
    (2, 1, "gather", "killed", "sharded"),
    (2, 1, "gather", "gone", "replicated"),
    (2, 0, "between", "gone", "sharded"),
    (2, 1, "between", "killed", "replicated"),
    (2, 1, "backward", "stalls", "sharded"),
    (2, 0, "before step", "stalls", "sharded"),
    (2, 1, "between", "stalls", "replicated"),
    (4, 2, "backward", "killed", "sharded"),
    (4, 1, "backward", "gone", "replicated"),
    (4, 3, "before step", "stalls", "sharded"),
    (4, 0, "gather", "killed", "sharded"),
    (4, 2, "backward", "killed", "owned"),
    (2, 1, "gather", "killed", "owned"),
]


EVERY_TIME = (CASES[0], CASES[3], CASES[9])


@pytest.mark.parametrize(
    ("world", "victim", "where", "how", "update"),
    [case if case in EVERY_TIME else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_every_survivor_names_the_rank_the_phase_and_the_group(world, victim, where, how, update):
    limit = STALL_TIMEOUT if how == "stalls" else DEATH_TIMEOUT
    outcomes = run_workers(survive, world, where, how, update, victim, group_timeout=limit, expect_dead={victim})
    assert isinstance(outcomes[victim], WorkerDied)
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            continue
        assert isinstance(outcome, tuple), outcome
        message, seconds, _ = outcome
        assert re.search(rf"Rank {victim} .* during the (reduce-scatter|all-gather) of fusion group \d+", message), (
            message
        )
        # Where chunks are uneven a rank that owns nothing of a group is ahead of one that is still reducing it.
        if where in ("gather", "before step") and update == "sharded":
            assert "all-gather" in message, message
        assert "\n" not in message
        assert seconds < DEATH_TIMEOUT * 0.8, f"rank {rank} took {seconds} s"


SCRIPT = """
    import os, sys, time
    import torch, torch.distributed as dist
    from datetime import timedelta
    sys.path[:0] = [{root!r}, {tests!r}]
    import dear, training
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    model, opt = training.build("Mlp", training.SGD, {{}})
    engine = dear.attach(model, opt, update={update!r}, bucket_cap_mb=0.002)
"""


def scripts(tmp_path, update, *bodies):
    """Two plain scripts, not workers: how they end is the test. Returns exit codes and outputs."""
    tests = os.path.dirname(os.path.abspath(__file__))
    head = textwrap.dedent(SCRIPT.format(root=os.path.dirname(tests), tests=tests, update=update))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(body), str(rank), str(tmp_path / "rendezvous")],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, body in enumerate(bodies)
    ]
    try:
        outputs = [process.communicate(timeout=250)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize("update", ["sharded", pytest.param("replicated", marks=pytest.mark.slow)])
def test_a_script_that_raises_ends_and_is_named_by_the_others(tmp_path, update):
    train = """
    for step in range(100):
        loss = training.loss_of(model, rank, step)
        loss.backward()
        if rank == 1 and step == 5:
            raise KeyError("a fault of the user's own")
        opt.step()
        opt.zero_grad()
    """
    codes, outputs = scripts(tmp_path, update, train, train)
    assert codes == [1, 1]
    assert "a fault of the user's own" in outputs[1]
    assert re.search(r"RuntimeError: Rank 1 .* of fusion group \d", outputs[0]), outputs[0]


@pytest.mark.parametrize("update", ["sharded", pytest.param("replicated", marks=pytest.mark.slow)])
def test_a_script_may_end_right_after_step(tmp_path, update):
    """Its peer, which comes later, still gets all that it waits for."""
    train = """
    for step in range(4):
        loss = training.loss_of(model, rank, step)
        if rank == 1 and step == 3:
            time.sleep(1)
        loss.backward()
        if rank == 1 and step == 3:
            time.sleep(1)
        opt.step()
        opt.zero_grad()
    """
    finish = """
    engine.synchronize()
    print(sum(p.double().sum().item() for p in model.parameters()))
    """
    codes, outputs = scripts(tmp_path, update, train, train + finish)
    assert codes == [0, 0], outputs
    assert float(outputs[1].splitlines()[-1])


def no_error_is_lost(rank, world, update):
    """The failure happens while nobody waits; whatever the engine is asked next tells it, and tells it again."""
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, bucket_cap_mb=0.002)
    for step in range(FATAL):
        training.plain_step(model, opt, rank, step)
    saved = {name: value.clone() for name, value in model.module.state_dict().items()}
    if rank == 1:
        if update == "sharded":
            training.loss_of(model, rank, FATAL).backward()
        time.sleep(0.3)
        os._exit(7)
    loss = training.loss_of(model, rank, FATAL)
    loss.backward()
    if update == "sharded":
        engine._attached.scheduler.synchronize()
    opt.step()
    time.sleep(1)  # the lane has failed by now

    def recap():
        engine.bucket_cap_mb = 1

    for name, ask in {
        "synchronize": engine.synchronize,
        "state_dict": model.state_dict,
        "inner state_dict": model.module.state_dict,
        "forward": lambda: training.loss_of(model, rank, FATAL + 1),
        "evaluation": lambda: torch.no_grad()(training.loss_of)(model, rank, FATAL + 1),
        "engine.state_dict": engine.state_dict,
        "optimizer.state_dict": opt.state_dict,
        "parameters": lambda: [param.sum() for param in model.parameters()],
        "load_state_dict": lambda: model.module.load_state_dict(saved),
        "bucket_cap_mb": recap,
        "stop_trace": engine.stop_trace,
        "detach": engine.detach,
    }.items():
        try:
            ask()
        except RuntimeError as error:
            assert re.search(r"Rank 1 .* of fusion group \d", str(error)), (name, error)
        else:
            raise AssertionError(f"{name} did not tell")


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_no_error_of_a_background_thread_is_lost(update):
    outcomes = run_workers(no_error_is_lost, 2, update, group_timeout=STALL_TIMEOUT, expect_dead={1})
    assert outcomes[0] is None, outcomes[0]


def missing_while_clipping(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, bucket_cap_mb=0.002)
    for step in range(FATAL):
        training.plain_step(model, opt, rank, step)
    training.loss_of(model, rank, FATAL).backward()
    engine._attached.scheduler.synchronize()
    if rank == 1:
        time.sleep(1000)
    with pytest.raises(RuntimeError, match=r"Rank 1 .* all-gather of the gradient norm"):
        engine.clip_grad_norm_(1.0)


@pytest.mark.slow
def test_a_peer_that_stalls_before_clipping_is_named():
    outcomes = run_workers(missing_while_clipping, 2, group_timeout=STALL_TIMEOUT, expect_dead={1})
    assert outcomes[0] is None, outcomes[0]


def left_with_an_error(rank, world):
    """The context manager: who leaves by an exception does not wait, and tells the others at once."""
    model, opt = training.build("Mlp", training.SGD, {})
    start = time.monotonic()
    with pytest.raises((KeyError, RuntimeError)) as caught, dear.attach(model, opt, bucket_cap_mb=0.002):
        for step in range(20):
            if rank == 1 and step == FATAL:
                raise KeyError("mine")
            training.plain_step(model, opt, rank, step)
    assert time.monotonic() - start < DEATH_TIMEOUT * 0.8
    if rank == 1:
        assert caught.type is KeyError
    else:
        why = r"Rank 1 (left the engine's context with KeyError|.* of fusion group \d)"
        assert re.search(why, str(caught.value)), caught.value


def test_an_exception_leaves_the_context_without_waiting():
    run_workers(left_with_an_error, 2, group_timeout=DEATH_TIMEOUT)


def dropped(rank, world):
    """Engines that nobody holds any more leave no thread behind."""
    import gc

    def ours():
        return sum(count for name, count in threads().items() if name.startswith("dear"))

    # What an earlier test left in cycles, or torch keeps of the last DDP module until there is another. Something may
    # stay all the same, and end later.
    training.plain_step(*training.build("Mlp", training.SGD, {}), rank, 0)
    gc.collect()
    before = ours()
    for update in ("sharded", "replicated"):
        model, opt = training.build("Mlp", training.SGD, {})
        engine = dear.attach(model, opt, update=update, bucket_cap_mb=0.002)
        for step in range(4):
            training.plain_step(model, opt, rank, step)
        engine.synchronize()
        torch.distributed.barrier()
        assert ours() >= 2
        del model, opt, engine
        gc.collect()
        torch.distributed.barrier()
        assert ours() <= before, f"{update}: a lane's thread was left behind"


def test_a_dropped_engine_leaves_no_thread(pool2):
    pool2.run(dropped)
