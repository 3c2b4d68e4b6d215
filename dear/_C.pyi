# Generated from the compiled module by "make stubs".
# ruff: noqa
"""
The native part: collectives, schedule, compressors and what preconditioners compute.
"""

from __future__ import annotations
import collections.abc
import datetime
import torch
import torch._C._distributed_c10d
import torch.distributed.distributed_c10d
import typing

__all__: list[str] = [
    "AcpCodec",
    "BLOCK",
    "Bucket",
    "BucketBuffers",
    "Codec",
    "CompressedHook",
    "DenseCodec",
    "Exchange",
    "GradientWalk",
    "HalfCodec",
    "HookCalls",
    "Lane",
    "LevelledCodec",
    "LocalCodec",
    "MatrixBatch",
    "MeanCapture",
    "MeshLane",
    "Message",
    "NativeLane",
    "Ownership",
    "Peers",
    "Phase",
    "Pipeline",
    "PipelineCounts",
    "PowerCodec",
    "PythonCodec",
    "QuantizedCodec",
    "Reduction",
    "RingLane",
    "SCALE_UNIT",
    "SIGN_RECORD",
    "Scheduler",
    "SignCodec",
    "StagedCodec",
    "StartStep",
    "TopKCodec",
    "TraceEvent",
    "TwoLevelCodec",
    "TwoLevelLane",
    "TwoPhaseExchange",
    "Unreduced",
    "UpdateSpan",
    "add_products",
    "can_move",
    "checksum",
    "checksum_each_way",
    "checksums",
    "dot_by_block",
    "eva_correction",
    "exchange_grad",
    "expects_gradients",
    "fingerprint",
    "finite_message",
    "from_triangles",
    "has_aliases",
    "levelled_words",
    "mean_of_windows",
    "move_storage",
    "orthogonalize_workspace_numel",
    "quantized_words",
    "rebuild_buckets",
    "register_compressed_hook",
    "register_scheduler",
    "set_python_dispatch",
    "shard_range",
    "sign_payload_numel",
    "subtract_products",
    "take_buckets",
    "topk_slot_numel",
    "topk_workspace_numel",
    "update_means",
    "write_triangles",
]

class Phase:
    """
    Members:

      reduce_scatter

      all_gather

      all_to_all
    """

    __members__: typing.ClassVar[dict[str, Phase]]
    all_gather: typing.ClassVar[Phase]
    all_to_all: typing.ClassVar[Phase]
    reduce_scatter: typing.ClassVar[Phase]
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Reduction:
    """
    Members:

      sum

      average
    """

    __members__: typing.ClassVar[dict[str, Reduction]]
    average: typing.ClassVar[Reduction]
    sum: typing.ClassVar[Reduction]
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Exchange:
    def bytes_sent(self) -> int: ...
    def done(self) -> bool: ...
    def wait(self) -> None: ...
    @property
    def end_ns(self) -> int: ...
    @property
    def label(self) -> str: ...
    @property
    def start_ns(self) -> int: ...

class Ownership:
    @staticmethod
    def even(
        numel: typing.SupportsInt | typing.SupportsIndex, world: typing.SupportsInt | typing.SupportsIndex
    ) -> Ownership: ...
    def __init__(
        self,
        numel: typing.SupportsInt | typing.SupportsIndex,
        ranges: collections.abc.Sequence[
            collections.abc.Sequence[
                tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]
            ]
        ],
    ) -> None: ...
    def ranges(self, rank: typing.SupportsInt | typing.SupportsIndex) -> list[tuple[int, int]]: ...
    def size(self, rank: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    @property
    def numel(self) -> int: ...
    @property
    def world(self) -> int: ...

class Lane:
    def abort(self, arg0: str) -> None: ...
    def investigate(self, phase: str, label: str, patience: datetime.timedelta) -> str | None: ...
    def submit(
        self,
        phase: Phase,
        reduction: Reduction,
        parts: collections.abc.Sequence[tuple[torch.Tensor, torch.Tensor]],
        label: str,
        owners: collections.abc.Sequence[Ownership] = [],
    ) -> Exchange: ...
    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...

class Peers:
    def __init__(
        self,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
        address: str,
        *,
        checksum: bool = True,
        key: bytes = b"",
        recorder: str = "",
    ) -> None: ...
    @property
    def failed(self) -> bool: ...
    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...

class RingLane(Lane):
    def __init__(
        self,
        peers: Peers,
        store: torch.distributed.distributed_c10d.Store,
        key: str,
        timeout: datetime.timedelta,
        ranks: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
    ) -> None: ...

class MeshLane(Lane):
    def __init__(
        self,
        peers: Peers,
        store: torch.distributed.distributed_c10d.Store,
        key: str,
        timeout: datetime.timedelta,
        ranks: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
    ) -> None: ...

class NativeLane(Lane):
    def __init__(self, group: torch.distributed.distributed_c10d.ProcessGroup) -> None: ...

class TwoLevelLane(Lane):
    def __init__(
        self,
        inside: Lane,
        between: Lane,
        nodes: collections.abc.Sequence[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]],
    ) -> None: ...
    @property
    def bytes_between(self) -> int: ...
    @property
    def bytes_inside(self) -> int: ...

class Message:
    @property
    def full(self) -> torch.Tensor: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def shard(self) -> torch.Tensor: ...

class Codec:
    def advance(
        self, step: typing.SupportsInt | typing.SupportsIndex, stage: typing.SupportsInt | typing.SupportsIndex
    ) -> Message | None: ...
    def bind(self, gradient: torch.Tensor, result: torch.Tensor) -> None: ...
    def compresses(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def dropped(self) -> torch.Tensor: ...
    def first_stages(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def nonfinite(self) -> torch.Tensor | None: ...
    def settle(self) -> None: ...
    def stages(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...

class PythonCodec(Codec):
    def __init__(self, dropped: torch.Tensor, object: typing.Any) -> None: ...

class DenseCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...

class TwoLevelCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        inner: Codec,
        owners: Ownership,
        place: typing.SupportsInt | typing.SupportsIndex,
        readers: collections.abc.Sequence[Codec],
        between: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...

class StartStep:
    def __init__(self, step: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def step(self) -> int: ...
    @step.setter
    def step(self, arg1: typing.SupportsInt | typing.SupportsIndex) -> None: ...

class StagedCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        start: StartStep,
        dense: Codec,
        compressed: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, Codec]],
    ) -> None: ...

class SignCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
        words: typing.SupportsInt | typing.SupportsIndex,
        owned: typing.SupportsInt | typing.SupportsIndex,
        error: torch.Tensor | None,
        owner_error: torch.Tensor | None,
        scaled: bool,
    ) -> None: ...

class HalfCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
        shard: typing.SupportsInt | typing.SupportsIndex,
        owned: typing.SupportsInt | typing.SupportsIndex,
        dtype: torch.dtype,
        error: torch.Tensor | None,
        owner_error: torch.Tensor | None,
    ) -> None: ...

class QuantizedCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
        shard: typing.SupportsInt | typing.SupportsIndex,
        owned: typing.SupportsInt | typing.SupportsIndex,
        floating: bool,
        seed: typing.SupportsInt | typing.SupportsIndex,
        error: torch.Tensor | None,
        owner_error: torch.Tensor | None,
    ) -> None: ...

class LevelledCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
        shard: typing.SupportsInt | typing.SupportsIndex,
        owned: typing.SupportsInt | typing.SupportsIndex,
        bits: typing.SupportsInt | typing.SupportsIndex,
        error: torch.Tensor | None,
        owner_error: torch.Tensor | None,
        squares: torch.Tensor | None,
    ) -> None: ...

class TopKCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
        numel: typing.SupportsInt | typing.SupportsIndex,
        shard: typing.SupportsInt | typing.SupportsIndex,
        owned: typing.SupportsInt | typing.SupportsIndex,
        k: typing.SupportsInt | typing.SupportsIndex,
        owner_k: typing.SupportsInt | typing.SupportsIndex,
        capacity: typing.SupportsInt | typing.SupportsIndex,
        stretch: typing.SupportsInt | typing.SupportsIndex,
        error: torch.Tensor | None,
        owner_error: torch.Tensor | None,
    ) -> None: ...
    @property
    def selected(self) -> torch.Tensor: ...
    @property
    def threshold(self) -> torch.Tensor: ...

class MatrixBatch:
    def __init__(self, starts: torch.Tensor, error: torch.Tensor | None, p: torch.Tensor, q: torch.Tensor) -> None: ...

class AcpCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
        batches: collections.abc.Sequence[MatrixBatch],
        segments: torch.Tensor,
        dense_numel: typing.SupportsInt | typing.SupportsIndex,
        wire: torch.dtype | None,
        start: StartStep,
    ) -> None: ...

class PowerCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
        batches: collections.abc.Sequence[MatrixBatch],
        segments: torch.Tensor,
        dense_numel: typing.SupportsInt | typing.SupportsIndex,
        wire: torch.dtype | None,
    ) -> None: ...

class LocalCodec(Codec):
    def __init__(
        self,
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
        world: typing.SupportsInt | typing.SupportsIndex,
        batches: collections.abc.Sequence[MatrixBatch],
        segments: torch.Tensor,
        dense_numel: typing.SupportsInt | typing.SupportsIndex,
        wire: torch.dtype | None,
    ) -> None: ...

class MeanCapture:
    def __init__(
        self,
        layers: list,
        like: torch.Tensor,
        columns: typing.SupportsInt | typing.SupportsIndex,
        rows: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def forget(self) -> None: ...
    def message(self, scale: typing.SupportsFloat | typing.SupportsIndex) -> torch.Tensor: ...
    def see(self, layer: typing.SupportsInt | typing.SupportsIndex, x: torch.Tensor, output: torch.Tensor) -> None: ...

class GradientWalk:
    def __init__(
        self,
        expected: collections.abc.Sequence[tuple[torch.Tensor, torch.Tensor]],
        idle: collections.abc.Sequence[torch.Tensor],
    ) -> None: ...
    def look(self) -> tuple[bool, bool, list[int], list[int]]: ...

class PipelineCounts:
    @property
    def between_ns(self) -> int: ...
    @property
    def bytes_sent(self) -> int: ...
    @property
    def decode_ns(self) -> int: ...
    @property
    def encode_ns(self) -> int: ...

class Pipeline:
    def __init__(
        self,
        lanes: collections.abc.Sequence[Lane],
        all_to_alls: collections.abc.Sequence[Lane],
        device: torch.device,
        rank: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def abort(self, arg0: str) -> None: ...
    @property
    def counts_of_last_step(self) -> PipelineCounts: ...
    @property
    def counts_of_step(self) -> PipelineCounts: ...
    @property
    def steps(self) -> int: ...
    @steps.setter
    def steps(self, arg1: typing.SupportsInt | typing.SupportsIndex) -> None: ...

class TwoPhaseExchange:
    def __init__(
        self,
        pipeline: Pipeline,
        codec: Codec,
        label: str,
        keeps: collections.abc.Sequence[torch.Tensor],
        rolls_back: bool,
    ) -> None: ...
    def bind(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        begin: typing.SupportsInt | typing.SupportsIndex,
        numel: typing.SupportsInt | typing.SupportsIndex,
        runs: collections.abc.Sequence[
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex,
            ]
        ],
    ) -> None: ...
    def compressed(self) -> bool: ...
    def has_nonfinite(self) -> bool: ...
    def keep_gradient(self) -> None: ...
    def roll_back(self) -> None: ...
    def take_gradient(self) -> torch.Tensor | None: ...

class CompressedHook:
    def __init__(
        self,
        pipeline: Pipeline,
        bind: collections.abc.Callable,
        measure: collections.abc.Callable,
        ended: collections.abc.Callable,
    ) -> None: ...
    def forget(self) -> None: ...
    def measure_next(self) -> None: ...
    def on_bucket(self, bucket: torch._C._distributed_c10d.GradBucket) -> torch.Future: ...
    def roll_back(self) -> None: ...
    def set_always_ended(self, arg0: bool) -> None: ...
    @property
    def exposed_ns(self) -> int: ...

class Bucket:
    @property
    def buffer(self) -> torch.Tensor: ...
    @property
    def grads(self) -> list[torch.Tensor]: ...
    @property
    def params(self) -> list[torch.Tensor]: ...

class BucketBuffers:
    def __init__(
        self,
        shard: torch.Tensor,
        full: torch.Tensor,
        owners: Ownership,
        portions: collections.abc.Sequence[Ownership] = [],
    ) -> None: ...

class TraceEvent:
    @property
    def end_ns(self) -> int: ...
    @property
    def lane(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def start_ns(self) -> int: ...

class UpdateSpan:
    def __enter__(self) -> None: ...
    def __exit__(self, arg0: typing.Any, arg1: typing.Any, arg2: typing.Any) -> None: ...

class HookCalls:
    def __init__(self) -> None: ...
    @property
    def total(self) -> int: ...
    @property
    def with_gil(self) -> int: ...

class Scheduler:
    def __init__(self, reduce_lane: Lane, gather_lane: Lane, gather_gradients: bool) -> None: ...
    def abort(self, arg0: str) -> None: ...
    def adopt_layout(
        self,
        buffers: collections.abc.Sequence[BucketBuffers],
        exchanges: collections.abc.Sequence[collections.abc.Sequence[TwoPhaseExchange]],
        placeholders: collections.abc.Sequence[tuple[torch.Tensor, torch.Tensor]],
        sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        gather_order: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    ) -> None: ...
    def any_dropped(self) -> bool: ...
    def ask_for_backward_end(self) -> None: ...
    def awaited_bucket(self) -> int | None: ...
    def bytes_sent(self) -> int: ...
    def clear_backward_ended(self) -> None: ...
    def forget_layout(self) -> None: ...
    def gathering(self) -> bool: ...
    def gradients_used(self) -> None: ...
    def has_gradients(self) -> bool: ...
    def incoming(self) -> list[Bucket]: ...
    def passes(self) -> int: ...
    def reduced(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def regroup(
        self,
        sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        gather_order: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    ) -> None: ...
    def release(self) -> None: ...
    def replace_buffers(self, buffers: collections.abc.Sequence[BucketBuffers]) -> None: ...
    def replace_placeholders(
        self, placeholders: collections.abc.Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None: ...
    def set_backward_ended(self, arg0: collections.abc.Callable, arg1: bool) -> None: ...
    def set_pipeline(self, pipeline: Pipeline) -> None: ...
    def start_trace(self) -> None: ...
    def stop_trace(self) -> list[TraceEvent]: ...
    def submit_gather(
        self, group: typing.SupportsInt | typing.SupportsIndex, portion: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> None: ...
    def synchronize(self) -> None: ...
    def take_wait_times(self) -> tuple[int, int]: ...
    def untouched(self) -> bool: ...
    def updating(self, group: typing.SupportsInt | typing.SupportsIndex | None) -> UpdateSpan: ...
    def wait_gathered(
        self, group: typing.SupportsInt | typing.SupportsIndex, portion: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> None: ...
    def wait_reduced(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...

class Unreduced:
    def __init__(
        self,
        params: collections.abc.Sequence[torch.Tensor],
        reducer: torch._C._distributed_c10d.Reducer,
        scheduler: Scheduler,
    ) -> None: ...
    def has(self, index: typing.SupportsInt | typing.SupportsIndex) -> bool: ...

def add_products(
    views: collections.abc.Sequence[torch.Tensor],
    layers: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    columns: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    a: torch.Tensor,
    products: torch.Tensor,
    squares: torch.Tensor,
) -> None: ...
def can_move(tensor: torch.Tensor) -> bool: ...
def checksum(data: bytes, seed: typing.SupportsInt | typing.SupportsIndex = 0) -> int: ...
def checksum_each_way(data: bytes, seed: typing.SupportsInt | typing.SupportsIndex = 0) -> list[tuple[str, int]]: ...
def checksums(tensors: collections.abc.Sequence[torch.Tensor]) -> list[int]: ...
def dot_by_block(
    x: torch.Tensor, y: torch.Tensor, first: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
) -> torch.Tensor: ...
def eva_correction(
    columns: torch.Tensor,
    rows: torch.Tensor,
    inner: torch.Tensor,
    squares: torch.Tensor,
    first_column: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    first_row: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    first_block: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    has_bias: collections.abc.Sequence[bool],
    learning_rates: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    damping: typing.SupportsFloat | typing.SupportsIndex,
    kl_clip: typing.SupportsFloat | typing.SupportsIndex | None,
) -> tuple[torch.Tensor, float]: ...
def exchange_grad(param: torch.Tensor, expected: torch.Tensor, value: torch.Tensor) -> bool: ...
def expects_gradients(arg0: torch._C._distributed_c10d.Reducer) -> bool: ...
def fingerprint(tensors: collections.abc.Sequence[torch.Tensor]) -> int: ...
def finite_message(
    flags: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    parts: collections.abc.Sequence[torch.Tensor],
) -> torch.Tensor: ...
def from_triangles(
    triangles: torch.Tensor,
    blocks: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
) -> torch.Tensor: ...
def has_aliases(tensors: collections.abc.Sequence[torch.Tensor]) -> bool: ...
def levelled_words(
    shard: typing.SupportsInt | typing.SupportsIndex, bits: typing.SupportsInt | typing.SupportsIndex
) -> int: ...
def mean_of_windows(
    image: torch.Tensor,
    windows: collections.abc.Sequence[
        typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(5)"]
    ],
) -> torch.Tensor: ...
def move_storage(tensor: torch.Tensor, target: torch.Tensor) -> None: ...
def orthogonalize_workspace_numel(
    batch: typing.SupportsInt | typing.SupportsIndex,
    rows: typing.SupportsInt | typing.SupportsIndex,
    columns: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def quantized_words(shard: typing.SupportsInt | typing.SupportsIndex) -> int: ...
@typing.overload
def rebuild_buckets(reducer: torch._C._distributed_c10d.Reducer, hook: Scheduler) -> None: ...
@typing.overload
def rebuild_buckets(reducer: torch._C._distributed_c10d.Reducer, hook: CompressedHook) -> None: ...
def register_compressed_hook(
    arg0: torch._C._distributed_c10d.Reducer, arg1: CompressedHook, arg2: HookCalls
) -> None: ...
def register_scheduler(
    arg0: torch._C._distributed_c10d.Reducer, arg1: Scheduler, arg2: HookCalls, arg3: bool
) -> None: ...
def set_python_dispatch(tensors: collections.abc.Sequence[torch.Tensor], on: bool) -> None: ...
def shard_range(
    arg0: typing.SupportsInt | typing.SupportsIndex,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[int, int]: ...
def sign_payload_numel(numel: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def subtract_products(
    views: collections.abc.Sequence[torch.Tensor],
    layers: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    columns: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    w: torch.Tensor,
    a: torch.Tensor,
    factor: typing.SupportsFloat | typing.SupportsIndex,
) -> None: ...
def take_buckets(reducer: torch._C._distributed_c10d.Reducer, scheduler: Scheduler) -> None: ...
def topk_slot_numel(capacity: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def topk_workspace_numel(numel: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def update_means(
    columns: torch.Tensor,
    rows: torch.Tensor,
    known: torch.Tensor,
    used: torch.Tensor,
    step_columns: torch.Tensor,
    step_rows: torch.Tensor,
    first_column: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    first_row: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    decay: typing.SupportsFloat | typing.SupportsIndex,
) -> None: ...
def write_triangles(matrices: torch.Tensor, triangles: torch.Tensor) -> None: ...

BLOCK: int = 4096
SCALE_UNIT: int = 512
SIGN_RECORD: int = 129
