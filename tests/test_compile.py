"""torch.compile, before or after ``dear.attach()``: graphs, breaks, runs and results are those of plain DDP."""

import contextlib

import pytest
import torch
import training
from holding import SMALL
from silence import check_told, told
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear
from dear._pending import Pending

STEPS = 6
BLOCKS = 5


class Block(nn.Module):
    """Something to compile by itself."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(16, width)

    def forward(self, x):
        return torch.relu(self.linear(x)) + 1


class Net(nn.Module):
    """Blocks that run one after another, each a fusion group of its own, or two."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(16) for _ in range(BLOCKS - 1)] + [Block(8)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Counts:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.graphs = self.runs = 0
        self.parameters = []  # of the model under the library
        self.pending = []  # of those, how many were on their way when a graph ran, by run

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*arguments):
            self.runs += 1
            self.pending.append(sum(isinstance(param, Pending) for param in self.parameters))
            return graph(*arguments)

        return run

    def seen(self):
        """What must be equal to plain DDP's."""
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        return {"graphs": self.graphs, "runs": self.runs, "breaks": breaks}


class Job:
    """A model in training, of which some form is compiled."""

    def __init__(self, form, how, rank):
        self.form, self.rank, self.counts, self.engine = form, rank, Counts(), None
        torch.manual_seed(0)
        self.net = Net()
        self.at("before DDP")
        self.model = DDP(self.net)
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.call, self.step = self.model, self.ordinary_step
        self.at("before attach")
        self.attach(how)
        self.at("after attach")

    def at(self, time):
        what, _, when = self.form.partition(", ")
        if when == time:
            self.compile(what)

    def attach(self, how):
        if how == "register":
            compress.register(self.model, compress.ACPSGD(rank=2, start_step=10**6))
        elif how != "plain":
            compressor = compress.ACPSGD(rank=2, start_step=10**6) if how == "compressed" else None
            update = None if how == "compressed" else how
            self.engine = dear.attach(self.model, self.opt, compressor=compressor, update=update or "auto", **SMALL)
            self.counts.parameters = list(self.model.parameters())

    def compile(self, what):
        options = {"backend": self.counts}
        if what == "module":
            self.net = torch.compile(self.net, **options)
        elif what == "module in place":
            self.net.compile(**options)
        elif what == "blocks":
            for i, block in enumerate(self.net.blocks):
                self.net.blocks[i] = torch.compile(block, **options)
        elif what == "blocks in place":
            for block in self.net.blocks:
                block.compile(**options)
        elif what == "blocks in the module":
            self.compile("blocks")
            self.compile("module")
        elif what == "blocks in the module in place":
            self.compile("blocks in place")
            self.compile("module in place")
        elif what == "DDP":
            self.call = torch.compile(self.model, **options)
        elif what == "DDP in place":
            self.model.compile(**options)
        elif what == "loss":
            self.loss = torch.compile(self.loss, **options)
        elif what == "step":
            self.step = torch.compile(self.ordinary_step, **options)
        elif what == "optimizer":
            self.opt.step = torch.compile(self.opt.step, **options)
        else:
            raise ValueError(what)

    def loss(self, x, y):
        return (self.call(x) - y).square().mean()

    def ordinary_step(self, x, y):
        loss = self.loss(x, y)
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()
        return loss

    def train(self):
        losses = []
        for step in range(STEPS):
            x, y = training.models.data(self.rank, step)
            losses.append(self.step(x, y).item())
            if step == 3:
                with torch.no_grad():
                    losses.append(self.call(x).sum().item())
        with contextlib.ExitStack() as stack:
            if self.engine is not None:
                stack.callback(self.engine.detach)
            final = [param.detach().clone() for param in self.model.parameters()]
        return losses, final


#: What is compiled, and when: before the module is wrapped, before the library is attached, or after it.
FORMS = [
    "module, before DDP",
    "module in place, before DDP",
    "module in place, after attach",
    "blocks, before DDP",
    "blocks in place, before DDP",
    "blocks in place, after attach",
    "blocks in the module, before DDP",
    "blocks in the module in place, after attach",
    "DDP, before attach",
    "DDP, after attach",
    "DDP in place, before attach",
    "DDP in place, after attach",
    "loss, after attach",
]
#: Those that are like another form in all but one of the two, and so are slow.
ALIKE = {
    "module in place, before DDP",
    "blocks, before DDP",
    "blocks in place, after attach",
    "blocks in the module, before DDP",
    "DDP, after attach",
    "DDP in place, before attach",
    "optimizer, before attach",
    "optimizer, after attach",
}
# Here plain DDP compiles the optimizer too, whose kernels round otherwise; with an engine it runs as it is.
OPTIMIZER_FORMS = ["step, after attach", "optimizer, before attach", "optimizer, after attach"]
HOWS = ("sharded", "replicated", "compressed", "register")


def often(forms):
    """The forms, as parameters of a test."""
    return [pytest.param(form, marks=pytest.mark.slow) if form in ALIKE else form for form in forms]


@told
def compiled(rank, world, forms, hows=HOWS):
    for form in forms:
        plain = Job(form, "plain", rank)
        want = plain.train()
        wanted = plain.counts.seen()
        breaks = wanted.pop("breaks")
        assert wanted["graphs"], f"{form}: plain DDP compiles nothing"
        for how in hows:
            job = Job(form, how, rank)
            losses, final = job.train()
            have = job.counts.seen()
            assert losses == want[0], f"{form}, {how}: {losses} instead of {want[0]}"
            assert all(map(torch.equal, final, want[1])), f"{form}, {how}: other parameters"
            assert have.pop("breaks") <= breaks, f"{form}, {how}: more graph breaks than {breaks}"
            assert have == wanted, f"{form}, {how}: {have} instead of {wanted}"


@pytest.mark.parametrize("form", often(FORMS))
def test_compiles_as_plain_ddp_does(pool2, form):
    check_told(pool2, compiled, [form])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_owned_updates_compile_as_plain_ddp_does(pool2, form):
    check_told(pool2, compiled, [form], ("owned",))


@told
def compiled_with_optimizer(rank, world, form):
    plain = Job(form, "plain", rank)
    losses, final = plain.train()
    for how in HOWS:
        job = Job(form, how, rank)
        have = job.train()
        torch.testing.assert_close(have, (losses, final), rtol=1e-3, atol=1e-5)
        if form.startswith("step"):
            assert job.counts.graphs <= plain.counts.graphs, f"{how}: {job.counts.seen()} for {plain.counts.seen()}"


@pytest.mark.parametrize("form", often(OPTIMIZER_FORMS))
def test_compiled_steps_train_as_with_plain_ddp(pool2, form):
    check_told(pool2, compiled_with_optimizer, form)


@told
def overlapped(rank, world, form, how):
    job = Job(form, how, rank)
    job.train()
    assert job.counts.graphs >= BLOCKS
    last_step = job.counts.pending[-BLOCKS:]
    assert last_step[0] > 0, "the first block waits for the others' parameters"
    assert last_step[-1] == 0


@pytest.mark.parametrize("how", ["sharded", "replicated", "compressed"])
@pytest.mark.parametrize("form", ["blocks, before DDP", "blocks in place, before DDP", "blocks in place, after attach"])
def test_blocks_compiled_one_by_one_wait_for_their_own_parameters(pool2, form, how):
    check_told(pool2, overlapped, form, how)


class Calling(Net):
    """Its forward hands a parameter to a compiled function, and is not compiled itself."""

    def forward(self, x):
        return scaled(super().forward(x), self.blocks[-1].linear.bias)


def scaled(x, bias):
    return x * bias.norm()


def averaged(shadow, params):
    for mean, param in zip(shadow, params, strict=True):
        mean.lerp_(param, 0.5)


@told
def read_by_compiled_code(rank, world, how):
    """Nobody stands in front of a compiled function that is not a module: what it reads must be right all the same."""
    finals = []
    for kind in ("plain", how):
        counts = Counts()
        global scaled
        eager, scaled = scaled, torch.compile(scaled, backend=counts)
        average = torch.compile(averaged, backend=counts)
        try:
            torch.manual_seed(0)
            net = Calling()
            model = DDP(net)
            opt = torch.optim.AdamW(net.parameters(), lr=0.01)
            engine = dear.attach(model, opt, update=kind, **SMALL) if kind != "plain" else None
            shadow = [param.detach().clone() for param in net.parameters()]
            for step in range(STEPS):
                x, y = training.models.data(rank, step)
                if step == 4:  # in place of a block that hooks know
                    net.blocks[1] = torch.compile(net.blocks[1], backend=counts)
                (model(x) - y).square().mean().backward()
                opt.step()
                opt.zero_grad()
                with torch.no_grad():
                    average(shadow, list(net.parameters()))
            if engine is not None:
                engine.detach()
        finally:
            scaled = eager
        assert counts.graphs
        finals.append([*shadow, *(param.detach() for param in net.parameters())])
    assert all(map(torch.equal, *finals))


@pytest.mark.parametrize("how", ["sharded", "replicated"])
def test_compiled_code_that_nobody_stands_in_front_of_reads_finished_parameters(pool2, how):
    check_told(pool2, read_by_compiled_code, how)


@told
def exported(rank, world, how):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=how, **SMALL)
    for step in range(3):
        training.plain_step(model, opt, rank, step)
    x, _ = training.models.data(rank, 9)
    program = torch.export.export(model.module, (x,))
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))
    engine.detach()


@pytest.mark.parametrize("how", ["sharded", "replicated"])
def test_a_model_can_be_exported_between_steps(pool2, how):
    check_told(pool2, exported, how)
