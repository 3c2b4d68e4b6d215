"""What this library needs of a DistributedDataParallel module beyond its public interface, in one place."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C
from dear._names import named_parameters
from dear._open_pass import is_open, refuse_backward

HOOK_NAME = "dear"
COMPRESS_HOOK_NAME = "compress"
ENGINE = "_dear_engine"  # the attribute that marks a module and an optimizer as taken


def parameter_names(model: DDP) -> dict[torch.nn.Parameter, str]:
    """All parameters of the module, and their plain names in it."""
    return {param: name for name, param in named_parameters(model.module)}


def reduced_parameters(model: DDP) -> list[torch.nn.Parameter]:
    """The parameters whose gradients DDP reduces: those that required one when it was built.

    Raises:
        ValueError: there are none; or some were frozen or thawed since, and DDP does not tell which.
    """
    count = model._get_ddp_logging_data()["num_parameter_tensors"]
    ignored = set(model.parameters_to_ignore)
    candidates = [param for name, param in model.module.named_parameters() if name not in ignored]
    trained = [param for param in candidates if param.requires_grad]
    if not trained:
        raise ValueError("No parameter of this model requires a gradient: there is nothing to communicate.")
    if len(trained) == count:
        found = trained
    elif len(candidates) == count:
        found = candidates
    else:
        raise ValueError(
            f"DDP was built when {count} parameters required a gradient and now {len(trained)} do: freeze or thaw "
            "parameters before the model is wrapped in DistributedDataParallel."
        )
    return found


def has_hook(model: DDP) -> bool:
    """Whether somebody's communication hook is registered."""
    return bool(getattr(model, "_comm_hooks", None) or model._get_ddp_logging_data().get("comm_hook"))


@dataclasses.dataclass(frozen=True)
class ReducerOptions:
    """How DDP's reducer is built: bucket sizes in bytes, and whether .grad is a view of the bucket."""

    cap: int
    first: int
    views: bool


def reducer_options(model: DDP) -> ReducerOptions:
    """The options of the module's reducer as it stands."""
    config = getattr(model, "_bucket_config", None)
    if config is not None:
        first = config.first_bucket_bytes_cap
    else:  # torch before 2.13
        first = dist._DEFAULT_FIRST_BUCKET_BYTES if model.bucket_bytes_cap_default else model.bucket_bytes_cap
    return ReducerOptions(int(model.bucket_bytes_cap), int(first), model.gradient_as_bucket_view)


@contextlib.contextmanager
def _thawed(params: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """A reducer is built of the parameters that require a gradient, and cannot be told otherwise."""
    frozen = [param for param in params if not param.requires_grad]
    for param in frozen:
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in frozen:
            param.requires_grad_(False)


@contextlib.contextmanager
def _bucket_sizes(model: DDP, options: ReducerOptions) -> Iterator[None]:
    """Inside, DDP builds a reducer with these sizes. Afterwards it shows its own again: torch.compile cuts graphs at
    the ends of such buckets, and shall cut them as without this library."""
    names = ("bucket_bytes_cap", "bucket_bytes_cap_default", "bucket_bytes_cap_list", "_bucket_config")
    former = {name: getattr(model, name) for name in names if hasattr(model, name)}
    model.bucket_bytes_cap = options.cap
    model.bucket_bytes_cap_default = options.first < options.cap
    model.bucket_bytes_cap_list = []
    if "_bucket_config" in former:  # from torch 2.13 on
        model._bucket_config = dataclasses.replace(
            former["_bucket_config"], bucket_bytes_cap=options.cap, per_bucket_bytes_caps=(),
            first_bucket_bytes_cap=options.first,
        )  # fmt: skip
    try:
        yield
    finally:
        for name, value in former.items():
            setattr(model, name, value)


def rebuild_reducer(
    model: DDP,
    options: ReducerOptions,
    params: Sequence[torch.nn.Parameter],
    order: Sequence[torch.nn.Parameter] | None = None,
) -> list[torch.nn.Parameter]:
    """Gives ``model`` a new reducer of these parameters, frozen or not, without a hook. Collective.

    With ``order`` the reducer numbers the parameters so, and its buckets have this order at once and for good; only
    with a static graph it begins with one, since the first pass counts no others. Otherwise DDP begins with one, and
    rebuilds.

    Returns the parameters in the order in which the reducer numbers them.
    """
    open_pass = is_open(model)
    model._remove_autograd_hooks()
    model.gradient_as_bucket_view = options.views
    # With a static graph, the first backward pass of a reducer is reduced at its end, which DDP arranges once.
    model._static_graph_delay_allreduce_enqueued = False
    with _thawed(params), _bucket_sizes(model, options):
        parameters = _numbered(model, params) if order is None else list(order)
        known = parameter_names(model)
        names = {index: known.get(param, "") for index, param in enumerate(parameters)}
        model._ddp_init_helper(parameters, [False] * len(parameters), names, model.static_graph)
    if model.static_graph:
        model.reducer._set_static_graph()
        assert model.logger is not None
        model.logger._set_static_graph()
    if order is not None and not model.static_graph:
        model.reducer._push_all_rebuilt_params()
        model.reducer._rebuild_buckets()
    if open_pass:
        refuse_backward(model, parameters)
    return parameters


def rebuild_buckets(model: DDP, hook: _C.Scheduler | _C.CompressedHook) -> None:
    """Makes DDP lay its buckets anew at the end of its first backward pass, and not before the next forward pass.
    Collective; nothing happens in later passes, and where DDP keeps its buckets."""
    if model.static_graph:  # whose second pass would tell
        model.reducer._push_all_rebuilt_params()
    _C.rebuild_buckets(model.reducer, hook)


def register(model: DDP, scheduler: _C.Scheduler) -> _C.HookCalls:
    """Makes ``scheduler`` the communication hook of the module, whose reducer is new."""
    calls = _C.HookCalls()
    _C.register_scheduler(model.reducer, scheduler, calls, model.static_graph)
    assert model.logger is not None
    model.logger._set_comm_hook_name(HOOK_NAME)
    return calls


def unreduced(model: DDP, params: Sequence[torch.nn.Parameter], scheduler: _C.Scheduler) -> _C.Unreduced:
    """Watches for gradients of these parameters that the module's reducer, as it is now, does not reduce."""
    with _thawed(params):
        return _C.Unreduced(list(params), model.reducer, scheduler)


def register_compressed(model: DDP, hook: _C.CompressedHook) -> _C.HookCalls:
    """Makes a compressor's ``hook`` the module's communication hook."""
    calls = _C.HookCalls()
    _C.register_compressed_hook(model.reducer, hook, calls)
    assert model.logger is not None
    model.logger._set_comm_hook_name(COMPRESS_HOOK_NAME)
    return calls


def broadcasts_buffers(model: DDP) -> bool:
    """Whether DDP is about to broadcast buffers, in a forward pass that begins."""
    return bool(model._check_sync_bufs_pre_fwd())  # type: ignore[no-untyped-call]


def tracks_unused(model: DDP) -> bool:
    """Whether a parameter may go without a gradient, so that DDP keeps count."""
    return bool(model.find_unused_parameters or model.static_graph)


def in_reducer_order(model: DDP, params: Sequence[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """These parameters, all of the reducer's, in the order in which it numbers them."""
    with _thawed(params):
        return _numbered(model, params)


def _numbered(model: DDP, params: Sequence[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The reducer's parameters in DDP's order, whatever came into the model since it was wrapped, was taken out of it,
    which DDP has all the same, or was added to those that it ignores."""
    known, ignored = set(params), model.parameters_to_ignore
    named = model.module.named_parameters(remove_duplicate=False)
    reduced = {name for name, param in named if param in known}
    # DDP's names for those of the root begin with a dot.
    model.parameters_to_ignore = set(ignored) - reduced - {f".{name}" for name in reduced}
    try:
        found = [param for param in model._build_params_for_reducer()[0] if param in known]
    finally:
        model.parameters_to_ignore = ignored
    here = set(found)
    return found + [param for param in params if param not in here]


def used_parameters(model: DDP, parameters: list[torch.nn.Parameter]) -> set[torch.nn.Parameter] | None:
    """Those of :func:`in_reducer_order` that some rank has used in the last backward pass, or None when DDP does
    not count (all have)."""
    if not tracks_unused(model):
        return None
    used = model.reducer._get_local_used_map().cpu()
    return {param for param, count in zip(parameters, used.tolist(), strict=True) if count}
