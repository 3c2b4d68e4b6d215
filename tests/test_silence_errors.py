"""Errors name the cause that holds and the parameter; after a refusal everything is as it was."""

import models
import pytest
import torch
import training
from silence import check_told, known, told
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from training import SMALL

import compress
import dear


def sentence(call):
    """The one sentence that a call raises."""
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text, text
    return text


def warm(rank, update, steps=3):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    for step in range(steps):
        training.plain_step(model, opt, rank, step)
    return model, opt, engine


def unused(model, opt, rank):
    model.module.second.forward = lambda x: x
    training.loss_of(model, rank, 3).backward()
    opt.step()


def frozen(model, opt, rank):
    model.module.second.requires_grad_(False)
    training.loss_of(model, rank, 3).backward()
    opt.step()


def replaced(model, opt, rank):
    model.module.second.weight = nn.Parameter(torch.zeros(37, 37))
    training.loss_of(model, rank, 3).backward()
    opt.step()


def without_sync(model, opt, rank):
    with model.no_sync():
        training.loss_of(model, rank, 3).backward()
    opt.step()


CAUSES = {  # what happened, and what the sentence must say
    "unused": (unused, ["second.weight", "find_unused_parameters"], ["no_sync"]),
    "frozen": (frozen, ["second.weight", "requires_grad"], ["no_sync"]),
    "replaced": (replaced, ["second.weight"], ["no_sync"]),
    "without sync": (without_sync, ["no_sync"], []),
}


@told
def said(rank, world, update, cause):
    make, wanted, unwanted = CAUSES[cause]
    model, opt, engine = warm(rank, update)
    text = sentence(lambda: make(model, opt, rank))
    engine.__exit__(RuntimeError, RuntimeError(), None)  # without another collective
    for word in wanted:
        assert word in text, f"{word!r} is missing: {text}"
    for word in unwanted:
        assert word not in text, f"{word!r} misleads: {text}"


@pytest.mark.parametrize(
    ("update", "cause"),
    [known(f"cause-{cause}-{update}", update, cause) for cause in CAUSES for update in ("sharded", "replicated")],
)
def test_the_sentence_names_the_cause(pool2, update, cause):
    check_told(pool2, said, update, cause)


@told
def checkpointed(rank, world, update):
    """torch.distributed.checkpoint makes a dry step on zero gradients, to have the optimizer's state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, opt = training.build("Mlp", (torch.optim.AdamW, {"lr": 0.01}), {})
    dear.attach(model, opt, update=update, **SMALL)
    try:
        state = get_optimizer_state_dict(model, opt)
    except (RuntimeError, ValueError) as error:
        text = str(error)
        assert text.endswith(".") and "no_sync" not in text, text
    else:
        plain, plain_opt = training.build("Mlp", (torch.optim.AdamW, {"lr": 0.01}), {})
        want = get_optimizer_state_dict(plain, plain_opt)
        assert state["state"].keys() == want["state"].keys()


@pytest.mark.parametrize("update", [known(f"dry step-{update}", update) for update in ("sharded", "replicated")])
def test_a_checkpoint_before_the_first_step(pool2, update):
    check_told(pool2, checkpointed, update)


@told
def in_float64(rank, world, kind):
    """The default dtype is the user's affair."""
    finals = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        net = models.Mlp()
        model = DDP(net)
        opt = torch.optim.SGD(net.parameters(), lr=0.05)
        inputs = [models.data(rank, step) for step in range(4)]
        torch.set_default_dtype(dtype)
        try:
            dear.attach(model, opt, compressor=KINDS[kind](), **SMALL)
            for x, y in inputs:
                (model(x) - y).square().mean().backward()
                opt.step()
                opt.zero_grad()
            finals.append([value.clone() for value in net.state_dict().values()])
        finally:
            torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(*finals, strict=True):
        assert torch.equal(mine, theirs)


KINDS = {
    "acp": lambda: compress.ACPSGD(rank=2, min_compression_ratio=0.2),
    "power": lambda: compress.PowerSGD(rank=2, min_compression_ratio=0.2),
    "local": lambda: compress.LocalPowerSGD(rank=2, min_compression_ratio=0.2),
    "topk": lambda: compress.TopK(density=0.2, min_compression_ratio=0.2),
    "sign": lambda: compress.SignSGD(min_compression_ratio=0.2),
    "bf16": lambda: compress.Dense(),
}


@pytest.mark.parametrize("kind", [known(f"float64-{kind}", kind) for kind in KINDS])
def test_another_default_dtype_changes_nothing(pool2, kind):
    check_told(pool2, in_float64, kind)


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, which never called Optimizer.__init__."""

    def __init__(self, inner):
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


class Counting(torch.optim.SGD):
    """Its step counts itself, where no parameter's state is."""

    def __init__(self, params):
        super().__init__(params, 0.1)
        self.state["all"] = {"steps": 0}

    def step(self, closure=None):
        self.state["all"]["steps"] += 1
        return super().step(closure)


class Failing(compress.Compressor):
    """Fails where it is first asked something."""

    def ratio(self, group):
        raise ValueError("ratio() fails.")

    def options(self):
        raise ValueError("options() fails.")


def stranger(model, opt):
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    return opt


REFUSALS = {
    "not DDP": lambda m, o: dear.attach(m.module, o),
    "no optimizer": lambda m, o: dear.attach(m, None),
    "a wrapper": lambda m, o: dear.attach(m, Wrapper(o)),
    "unknown update": lambda m, o: dear.attach(m, o, update="half"),
    "unknown algorithm": lambda m, o: dear.attach(m, o, algorithm="tree"),
    "no size": lambda m, o: dear.attach(m, o, bucket_cap_mb=-1),
    "a size of text": lambda m, o: dear.attach(m, o, bucket_cap_mb="large"),
    "sharded and compressed": lambda m, o: dear.attach(m, o, compressor=compress.SignSGD(), update="sharded"),
    "sharded LBFGS": lambda m, o: dear.attach(m, torch.optim.LBFGS(m.parameters()), update="sharded"),
    "owned, with state of no parameter": lambda m, o: dear.attach(m, Counting(m.parameters()), update="owned"),
    "a stranger": lambda m, o: dear.attach(m, stranger(m, torch.optim.SGD(m.parameters(), 0.1))),
    "not a compressor": lambda m, o: dear.attach(m, o, compressor=3),
    "a failing compressor": lambda m, o: dear.attach(m, o, compressor=Failing()),
    "registered, not a compressor": lambda m, o: compress.register(m, 3),
    "registered, failing": lambda m, o: compress.register(m, Failing()),
    "registered, not DDP": lambda m, o: compress.register(m.module, compress.SignSGD()),
    "half of a group": lambda m, o: dear.attach(m, o, process_group=3),
}


def traces(model, opt):
    """What a library can leave behind on a model and an optimizer."""
    found = {"model": sorted(vars(model)), "optimizer": sorted(vars(opt)), "hooks": list(model._comm_hooks)}
    for name, module in model.named_modules():
        found[name] = sorted(vars(module))
        for registry in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
            found[f"{name} {registry}"] = len(getattr(module, registry))
    for registry in ("_optimizer_state_dict_pre_hooks", "_optimizer_load_state_dict_pre_hooks"):
        found[registry] = len(getattr(opt, registry))
    found["storages"] = [param.data_ptr() for param in model.parameters()]
    found["group options"] = model.bucket_bytes_cap, model.gradient_as_bucket_view
    return found


@told
def refused(rank, world, name):
    plain, plain_opt = training.build("Mlp", training.SGD, {})
    model, opt = training.build("Mlp", training.SGD, {})
    before = traces(model, opt)
    sentence(lambda: REFUSALS[name](model, opt))
    assert traces(model, opt) == before
    for step in range(3):
        want = training.plain_step(plain, plain_opt, rank, step)
        assert training.plain_step(model, opt, rank, step) == want
    with dear.attach(model, opt, **SMALL):  # and nothing stands in the way of another attempt
        for step in range(3, 6):
            want = training.plain_step(plain, plain_opt, rank, step)
            assert training.plain_step(model, opt, rank, step) == want


@pytest.mark.parametrize("name", [known(f"refusal-{name}", name) for name in REFUSALS])
def test_a_refusal_changes_nothing(pool2, name):
    check_told(pool2, refused, name)
