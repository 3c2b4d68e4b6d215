"""MPI's all-reduce and its two halves through mpi4py, for processes that mpirun or mpiexec has started."""

import functools
from typing import Any

import torch
import torch.distributed as dist

from .exact import AllGatherHalf, Method, Place, Placement, ReduceScatterHalf


@functools.cache
def communicator(world: int) -> tuple[Any, Any]:
    """mpi4py's module MPI, and a communicator of all ranks for these methods alone.

    Raises RuntimeError where MPI does not connect the ranks that torch connects; the message says what to do.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"mpi4py finds no MPI ({error}): start this with mpirun, or name an MPI with --mpi"
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized() or MPI.COMM_WORLD.size != world:
        raise RuntimeError("MPI did not start these processes: start them with mpirun, or name an MPI with --mpi")
    return MPI, MPI.COMM_WORLD.Dup()


class MpiMethod(Method):
    """Buffers as MPI takes them: in host memory, of the types for which MPI has a sum."""

    def __init__(self, place: Place, group: dist.ProcessGroup, placement: Placement) -> None:
        super().__init__(place, group, placement)
        if place.worker.device.type != "cpu":
            raise ValueError(f"MPI is given host tensors only here, not tensors on {place.worker.device}")
        if self.data.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"MPI has no sum of {self.data.dtype}")
        mpi, self.comm = communicator(place.worker.world)
        self.same = mpi.IN_PLACE
        # mpi4py takes numpy's arrays, which share the tensors' memory.
        self.send, self.receive, self.part = self.data.numpy(), self.out.numpy(), self.shard.numpy()


class MpiAllReduce(MpiMethod):
    """MPI_Allreduce."""

    name = "mpi"

    def run(self) -> None:
        self.comm.Allreduce(self.same if self.out is self.data else self.send, self.receive)


class MpiReduceScatter(MpiMethod, ReduceScatterHalf):
    """MPI_Reduce_scatter_block. In place MPI leaves every rank's part at the beginning of the buffer."""

    name = "mpi-rs"

    def __init__(self, place: Place, group: dist.ProcessGroup, placement: Placement) -> None:
        super().__init__(place, group, placement)
        if placement == "in_place":
            self.shard = self.data[: self.shard.numel()]
        self.buffers = (self.same, self.send) if placement == "in_place" else (self.send, self.part)

    def run(self) -> None:
        self.comm.Reduce_scatter_block(*self.buffers)


class MpiAllGather(MpiMethod, AllGatherHalf):
    """MPI_Allgather."""

    name = "mpi-ag"

    def run(self) -> None:
        self.comm.Allgather(self.same if self.out is self.data else self.part, self.receive)


class MpiHalves(MpiMethod):
    """MPI_Reduce_scatter_block, then MPI_Allgather.

    In place the shard stands in the other buffer between the two, since MPI allows no input to overlap an output.
    """

    name = "mpi-rs+ag"

    def __init__(self, place: Place, group: dist.ProcessGroup, placement: Placement) -> None:
        super().__init__(place, group, placement)
        if placement == "in_place":
            self.part = place.own(place.second).numpy()

    def run(self) -> None:
        self.comm.Reduce_scatter_block(self.send, self.part)
        self.comm.Allgather(self.part if self.out is self.data else self.same, self.receive)


MPI_METHODS: list[type[Method]] = [MpiAllReduce, MpiHalves, MpiReduceScatter, MpiAllGather]
