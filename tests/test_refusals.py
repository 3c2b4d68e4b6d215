"""Bad input gets one clear sentence, and nothing has been changed: plain DDP, or the engine, trains on as before."""

import copy
import pickle
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import training
from refusing import SMALL, both_modes, final, refused, same, trains_on_like_plain, warm
from torch import nn, optim
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear

# At attach


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight).abs()


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 8, sparse=True)

    def forward(self, x):
        return self.table((x.abs() * 5).long().clamp(max=15)).sum(1)


def sgd(model):
    return optim.SGD(model.parameters(), lr=0.05)


def attach_with_hook(hook):
    model = DDP(training.models.Mlp())
    model.register_comm_hook(None, hook)
    return model, sgd(model), {}, RuntimeError, "communication hook already"


def attach_with_builtin_hook():
    model = DDP(training.models.Mlp())
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    return model, sgd(model), {}, RuntimeError, "communication hook already"


def attach_with_python_reducer():
    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = "python_reducer"
    try:
        model = DDP(training.models.Mlp())
    finally:
        torch._dynamo.config.optimize_ddp = before
    return model, sgd(model), {}, ValueError, "python_reducer"


def attach_with_mixed_precision():
    from torch.nn.parallel.distributed import _MixedPrecision

    # DDP makes a stream, which a torch that is built for CUDA has none of without a GPU.
    with mock.patch.object(torch, "Stream", torch.cpu.Stream):
        model = DDP(training.models.Mlp(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    return model, sgd(model), {}, (ValueError, RuntimeError), "mixed_precision|communication hook already"


def attach_with_delayed_parameters():
    net = training.models.Mlp()
    named = list(net.named_parameters())
    model = DDP(net, delay_all_reduce_named_params=named[-2:], param_to_hook_all_reduce=named[0][1])
    return model, sgd(model), {}, ValueError, "delay_all_reduce_named_params"


def attach_with_dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    net = nn.Sequential(nn.Linear(4, 4))
    parallelize_module(net, init_device_mesh("cpu", (dist.get_world_size(),)), {"0": ColwiseParallel()})
    model = DDP(net, init_sync=False)
    return model, sgd(model), {}, ValueError, "device_mesh="


def attach_with_strangers():
    model = DDP(training.models.Mlp())
    opt = optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.05)
    return model, opt, {}, ValueError, "1 parameters that are not in the DDP module"


def attach_with_two_devices():
    model = DDP(training.models.Mlp())
    model.module.odd = nn.Parameter(torch.zeros(3, device="meta"))
    return model, optim.SGD(model.module.first.parameters(), lr=0.05), {}, ValueError, "cpu and meta"


def attach_with_optimizer_in_backward():
    from torch.distributed.optim import _apply_optimizer_in_backward

    net = training.models.Mlp()
    _apply_optimizer_in_backward(optim.SGD, net.last.parameters(), {"lr": 0.05})
    model = DDP(net)
    return model, optim.SGD(net.first.parameters(), lr=0.05), {}, ValueError, "_apply_optimizer_in_backward"


def attach_to(kind, match, **arguments):
    model = DDP(training.models.Mlp())
    return model, sgd(model), arguments, kind, match


def sparse_model():
    model = DDP(Sparse())
    return model, sgd(model), {}, ValueError, "table makes sparse gradients"


def sparse_optimizer():
    model = DDP(Sparse())
    return model, optim.SparseAdam(model.parameters()), {}, ValueError, "use Adam"


def complex_model():
    model = DDP(Complex())
    return model, sgd(model), {}, ValueError, "weight is complex"


def other_group():
    # A group of one's own is made without the other rank.
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = DDP(training.models.Mlp())
    return model, sgd(model), {"process_group": group}, ValueError, "the ranks of the DDP module's own group"


def custom_optimizer():
    class Mine(optim.SGD):
        pass

    model = DDP(training.models.Mlp())
    return model, Mine(model.parameters(), lr=0.05), {"update": "sharded"}, ValueError, 'use update="replicated"'


AT_ATTACH = {
    "python hook": lambda: attach_with_hook(allreduce_hook),
    "compressing hook": lambda: attach_with_hook(fp16_compress_hook),
    "builtin hook": attach_with_builtin_hook,
    "python reducer": attach_with_python_reducer,
    "mixed precision": attach_with_mixed_precision,
    "delayed parameters": attach_with_delayed_parameters,
    "DTensors": attach_with_dtensors,
    "complex": complex_model,
    "sparse embedding": sparse_model,
    "SparseAdam": sparse_optimizer,
    "strangers": attach_with_strangers,
    "two devices": attach_with_two_devices,
    "optimizer in backward": attach_with_optimizer_in_backward,
    "another group": other_group,
    "an optimizer that may not be elementwise": custom_optimizer,
    "no size": lambda: attach_to(ValueError, "positive number of MiB", bucket_cap_mb=0),
    "negative size": lambda: attach_to(ValueError, "positive number of MiB", bucket_cap_mb=-1),
    "not a size": lambda: attach_to(ValueError, "positive number of MiB", bucket_cap_mb=float("nan")),
    "a word for a size": lambda: attach_to(ValueError, "positive number of MiB", bucket_cap_mb="large"),
    "update": lambda: attach_to(ValueError, 'update must be "auto"', update="shared"),
    "algorithm": lambda: attach_to(ValueError, 'algorithm must be "ring"', algorithm="tree"),
}


def at_attach(rank, world):
    for name, make in AT_ATTACH.items():
        torch.manual_seed(0)
        model, opt, arguments, kind, match = make()
        before = {key: value.clone() for key, value in final(model).items() if value.device.type == "cpu"}
        reducer, step = model.reducer, opt.step
        with refused(kind, match):
            dear.attach(model, opt, **arguments)
        assert model.reducer is reducer and opt.step == step, f"{name}: something was changed"
        same(final(model), before)
        assert not model._forward_pre_hooks and not hasattr(model, "_dear_engine")
        if name in ("python hook", "builtin hook", "sparse embedding", "strangers", "no size", "algorithm"):
            losses = [training.plain_step(model, opt, rank, index) for index in range(3)]
            assert losses == sorted(losses, reverse=True) or len(set(losses)) == 3, f"{name}: it no longer trains"


def test_what_cannot_work_is_refused_at_attach(pool2):
    pool2.run(at_attach)


def wrong_things(rank, world):
    net = training.models.Mlp()
    model = DDP(net)
    opt = sgd(model)
    with refused(TypeError, "needs a DistributedDataParallel module, not Mlp"):
        dear.attach(net, opt)
    with refused(TypeError, "needs a torch.optim.Optimizer, not str"):
        dear.attach(model, "SGD")
    with refused(TypeError, "needs a torch.optim.Optimizer, not list"):
        dear.attach(model, [opt, [opt]])
    with refused(ValueError, "nothing to communicate"):
        frozen = DDP(training.models.Mlp())
        frozen.requires_grad_(False)
        dear.attach(frozen, sgd(frozen))
    engine = dear.attach(model, opt, **SMALL)
    other = DDP(training.models.Mlp())
    for pair in ((model, opt), (model, sgd(model)), (other, opt)):
        with refused(RuntimeError, "attached already"):
            dear.attach(*pair)
    with refused(ValueError, "positive number of MiB"):
        engine.bucket_cap_mb = 0
    training.plain_step(model, opt, rank, 0)
    engine.detach()


def test_wrong_objects_and_a_second_attach(pool2):
    pool2.run(wrong_things)


def disagreeing(rank, world):
    for name, mine in [
        ("bucket_cap_mb", {"bucket_cap_mb": 1 + rank}),
        ("update", {"update": ["sharded", "replicated"][rank]}),
        ("algorithm", {"algorithm": ["ring", "native"][rank]}),
        ("overlap_forward", {"overlap_forward": rank == 1}),
    ]:
        model, opt = training.build("Mlp", training.SGD, {})
        with refused(ValueError, f"Ranks 0 and 1 disagree on {name}"):
            dear.attach(model, opt, **mine)
        training.plain_step(model, opt, rank, 0)
    model, _ = training.build("Mlp", training.SGD, {})
    opt = [optim.Adam, optim.AdamW][rank](model.parameters())
    with refused(ValueError, "disagree on optimizer"):
        dear.attach(model, opt)


def test_arguments_that_differ_by_rank_are_refused_on_every_rank(pool2):
    pool2.run(disagreeing)


def on_one_rank(rank, world):
    """What only one rank cannot do is refused on all, at once, and training goes on as before."""
    attached = training.build("Mlp", training.SGD, {})
    engine = dear.attach(*attached)
    for wrong_optimizer, arguments, kind, match in [
        (None, {"bucket_cap_mb": -1}, ValueError, "positive number of MiB"),
        (None, {"update": "shared"}, ValueError, 'update must be "auto"'),
        (None, {"algorithm": "tree"}, ValueError, 'algorithm must be "ring"'),
        (None, {"compressor": "acp"}, TypeError, "needs a compressor"),
        (None, {"update": "sharded", "compressor": compress.ACPSGD()}, ValueError, "which a compressor would spoil"),
        (optim.SGD([torch.zeros(3)], lr=1.0), {}, ValueError, "1 parameters that are not in the DDP module"),
        ("SGD", {}, TypeError, "torch.optim.Optimizer, not str"),
        (attached[1], {}, RuntimeError, "attached already"),
    ]:
        model, opt = training.build("Mlp", training.SGD, {})
        start = time.monotonic()
        with refused(kind, rf"{match}.* \(on rank 1\)\.$"):
            if rank == 1:
                dear.attach(model, opt if wrong_optimizer is None else wrong_optimizer, **arguments)
            else:
                dear.attach(model, opt)
        assert time.monotonic() - start < 80
        trains_on_like_plain(rank, model, opt, 0)
    engine.detach()


def test_what_one_rank_refuses_is_refused_on_every_rank(pool2):
    pool2.run(on_one_rank)


def entrances(rank, world, update):
    model, opt, engine = warm(rank, update)
    for read, match in [
        (lambda: copy.deepcopy(model), "copy model.module"),
        (lambda: pickle.dumps(model.module), "save its state_dict"),
        (lambda: model.join().__enter__(), r"model.join\(\) cannot be used"),
        (lambda: Join([model]), r"model.join\(\) cannot be used"),
    ]:
        with refused(RuntimeError, match):
            read()
    duplicate = copy.deepcopy(model.module)
    same({name: value for name, value in duplicate.state_dict().items()}, model.module.state_dict())
    pickle.dumps(duplicate)
    assert not duplicate._forward_pre_hooks and not duplicate.first._forward_pre_hooks
    trains_on_like_plain(rank, model, opt, 3)

    extra = nn.Parameter(torch.zeros(3))
    opt.add_param_group({"params": [extra]})
    for _ in range(2):
        with refused(ValueError, "1 parameters that are not in the DDP module"):
            opt.step()
        with refused(ValueError, "1 parameters that are not in the DDP module"):
            training.loss_of(model, rank, 6)
    opt.param_groups.pop()
    opt.zero_grad()
    trains_on_like_plain(rank, model, opt, 6)
    engine.detach()
    pickle.dumps(model.module)
    assert copy.deepcopy(model) is not model


@both_modes
def test_copies_joins_and_new_parameters(pool2, update):
    pool2.run(entrances, update)


def converted(rank, world):
    model, _, engine = warm(rank, "sharded")
    model.half()
    with refused(RuntimeError, "changed from torch.float32 on cpu to torch.float16"):
        training.loss_of(model, rank, 3)
    engine.__exit__(RuntimeError, None, None)


def test_parameters_converted_under_the_engine(pool2):
    pool2.run(converted)


def grown(rank, world):
    model, _, engine = warm(rank, "sharded")
    name, param = next(iter(model.module.named_parameters()))
    param.data = torch.cat([param.data, param.data])
    with refused(RuntimeError, f"The parameter {name} was given the shape"):
        training.loss_of(model, rank, 3)
    engine.__exit__(RuntimeError, None, None)


def test_parameters_that_have_grown_under_the_engine(pool2):
    pool2.run(grown)


def scripted(rank, world):
    """A module of torch.jit reads parameters where nothing can wait for them. One without any is served."""

    def trained(attaches):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.jit.script(torch.nn.ReLU()), torch.nn.Linear(8, 2))
        model = DDP(net)
        opt = sgd(model)
        engine = dear.attach(model, opt, **SMALL) if attaches else None
        for step in range(3):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * step + rank))
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        if engine is not None:
            engine.detach()
        return final(model)

    same(trained(True), trained(False))
    model = DDP(torch.nn.Sequential(torch.jit.script(torch.nn.Linear(4, 4))))
    opt = sgd(model)
    with refused(ValueError, "The module 0 was made by torch.jit"):
        dear.attach(model, opt)
    assert not hasattr(model, "_dear_engine") and not hasattr(opt, "_dear_engine")


def test_scripted_modules(pool2):
    pool2.run(scripted)


def sparse_by_function(rank, world):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 8))
            self.sparse = True  # a name that many modules use for something else

        def forward(self, x):
            return F.embedding((x.abs() * 5).long().clamp(max=15), self.table, sparse=True).sum(1)

    model = DDP(Lookup())
    opt = sgd(model)
    engine = dear.attach(model, opt, **SMALL)
    with pytest.raises(RuntimeError):
        training.loss_of(model, rank, 0).backward()
    engine.__exit__(RuntimeError, None, None)


def test_sparse_gradients_that_show_only_in_backward_are_an_error(pool2):
    pool2.run(sparse_by_function)
