"""What Eva computes on the host in native code, beside the same by torch's operators."""

import preconditioning
import pytest
import torch
from test_eva import build, data
from test_eva_parts import LAYERS, draw, shared_out
from test_precondition_steps import after_a_dropped_batch, in_two, recomputed, whole, with_other_passes
from torch import nn

from precondition import eva_parts
from precondition._layers import ConvLayer, find_layers
from precondition.eva import EvaStep
from precondition.eva_host import HostMeans
from precondition.eva_means import Means, Running, matrix_of
from precondition.eva_rank_one import RankOneStep, Settings


class Described:
    """As much of a layer as its running means want to know."""

    def __init__(self, name, matrix):
        self.name, self.blocks = name, matrix.groups
        self.weight = nn.Parameter(torch.zeros(matrix.groups * matrix.rows, matrix.columns, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(len(self.weight), dtype=torch.float64)) if matrix.bias else None


@pytest.mark.parametrize("kl_clip", [None, 0.01, 1e9])
@pytest.mark.parametrize("rates", [[0.1] * 5, [0.1, 0.0, 0.3, 0.2, 0.4]])
def test_a_correction_is_that_of_torchs_operators(kl_clip, rates):
    for seed in range(4):
        results = []
        for finish in (EvaStep.finish, RankOneStep.finish):
            vectors, weights, biases, rows, columns = draw(LAYERS, seed)
            running = Running([Described(str(i), each) for i, each in enumerate(LAYERS)], True, torch.device("cpu"))
            running.rows.copy_(rows)
            running.columns.copy_(columns)
            step = EvaStep(running, Settings(0.03, 0.05, kl_clip))
            (parts,) = shared_out(vectors, weights, biases, 1, seed)
            step.take(parts)
            finish(step, rates, lambda values: values)
            results.append([*weights, *(each for each in biases if each is not None)])
        for native, plain in zip(*results, strict=True):
            torch.testing.assert_close(native, plain)


@pytest.mark.parametrize("kl_clip", [None, 0.01])
@pytest.mark.parametrize("finish", [EvaStep.finish, RankOneStep.finish], ids=["native", "torch"])
@pytest.mark.parametrize("rates", [[0.1] * 5, [0.1, 0.0, 0.3, 0.2, 0.4]], ids=["equal", "other"])
def test_a_layer_that_is_not_finite_does_not_count_in_the_bound(kl_clip, finish, rates):
    """The others' gradients become what they become where it has none; its own stay what they are."""
    results = []
    for value in (0.0, torch.inf, torch.nan):
        vectors, weights, biases, rows, columns = draw(LAYERS, 0)
        weights[1].fill_(0.0).view(-1)[0] = value
        if biases[1] is not None:
            biases[1].zero_()
        running = Running([Described(str(i), each) for i, each in enumerate(LAYERS)], True, torch.device("cpu"))
        running.rows.copy_(rows)
        running.columns.copy_(columns)
        step = EvaStep(running, Settings(0.03, 0.05, kl_clip))
        (parts,) = shared_out(vectors, weights, biases, 1, 0)
        step.take(parts)
        finish(step, rates, lambda values: values)
        results.append((weights, biases))
    (want, biases), *others = results
    for have, of_these in others:
        assert not have[1].isfinite().all()
        for index in (0, 2, 3, 4):
            torch.testing.assert_close(have[index], want[index])
            if biases[index] is not None:
                torch.testing.assert_close(of_these[index], biases[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_products_and_corrections_of_every_type(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for rows, columns in ((1, 1), (3, 17), (5, 64), (2, 300)):
        g, a, w = torch.randn(rows, columns).to(dtype), torch.randn(columns, dtype=wide), torch.randn(rows, dtype=wide)
        matrix = eva_parts.Matrix(1, rows, columns, False)
        parts = list(eva_parts.cut_weight(g.view(-1), 0, 0, eva_parts.Vectors([matrix], wide)))
        products, squares = torch.zeros(rows, dtype=wide), torch.zeros(1, dtype=wide)
        before = g.to(wide, copy=True)
        eva_parts.add_products_and_squares(parts, a, products, squares, eva_parts.Vectors([matrix], wide))
        torch.testing.assert_close(products, before @ a)
        torch.testing.assert_close(squares[0], before.square().sum())
        eva_parts.subtract_on_host(parts, w, a, 0.5)
        torch.testing.assert_close(g, (0.5 * before - w.outer(a)).to(dtype))


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (1, 2), stride=(2, 1), dilation=(1, 3), groups=2, padding=(0, 2)),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", stride=2),
    nn.Conv1d(4, 8, 4, padding="same", groups=4),
    nn.Conv3d(2, 2, (2, 1, 3), padding=(1, 0, 2), stride=(1, 2, 2)),
]


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_means_of_windows(module):
    layer = ConvLayer("", module)
    sizes = [7, 6, 9][: layer.row_dims - 1]
    for shape in ((3, module.in_channels, *sizes), (module.in_channels, *sizes)):
        x = torch.randn(shape)
        want = layer.windows(x).mean(list(range(layer.row_dims)))
        torch.testing.assert_close(layer.mean_row(x, torch.float32), want.flatten())


def test_vectors_that_do_not_fit_are_refused():
    vectors, weights, biases, rows, columns = draw(LAYERS)
    (parts,) = shared_out(vectors, weights, biases, 1, 0)
    with pytest.raises(ValueError, match="lies outside of the vectors"):
        eva_parts.subtract_on_host(parts, rows[:-1], columns, 1.0)
    with pytest.raises(ValueError, match="in as many parts as there are layers"):
        vectors.dot_rows(rows[:-1], rows[:-1])


def messages(net, run, with_rows=True, scaler=None):
    """What a step's means are by torch's operators and by native code, of the same passes."""
    layers = find_layers(net, set(net.parameters()))
    vectors = eva_parts.Vectors([matrix_of(layer) for layer in layers], torch.float64)
    both = [kind(layers, vectors, with_rows, scaler) for kind in (Means, HostMeans)]
    for means in both:
        means.watch()
    run(net)
    for means in both:
        means.release()
    return [means.message() for means in both]


def with_a_pass_in_eval_mode(net, x, y):
    net.eval()
    whole(net, x * 2, y)
    net.train()
    whole(net, x, y)


def frozen(net, x, y):
    net.twice.requires_grad_(False)
    whole(net, x, y)


def twice(net, x, y):
    (net(x) - net(x.flip(0)) - y).square().mean().backward()


@pytest.mark.parametrize(
    "run",
    [
        whole,
        in_two,
        twice,
        with_other_passes,
        after_a_dropped_batch,
        recomputed(False),
        recomputed(True),
        frozen,
        with_a_pass_in_eval_mode,
    ],
)
def test_means_count_what_counts(run):
    for with_rows in (True, False):
        x, y = preconditioning.batch(0, 0)
        plain, native = messages(preconditioning.build(), lambda net, x=x, y=y: run(net, x, y), with_rows)
        assert plain.any() and (len(native) == len(plain))
        torch.testing.assert_close(native, plain)


def test_means_of_layouts_and_types():
    """Other padding and memory formats, 16 bits, one sample, a scaled loss, an activation in place."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def backward(net, x):
        scaler.scale(net(x).float().square().mean()).backward()

    x, _ = data(0, 0)
    torch.testing.assert_close(*messages(build(), lambda net: backward(net, x), scaler=scaler))
    last = build().to(memory_format=torch.channels_last)
    torch.testing.assert_close(*messages(last, lambda net: backward(net, x), scaler=scaler))
    torch.testing.assert_close(*messages(nn.Conv2d(2, 3, 2).double(), lambda net: backward(net, x[0]), scaler=scaler))
    activated = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True)).double()
    torch.testing.assert_close(*messages(activated, lambda net: backward(net, x), scaler=scaler))
    with torch.autocast("cpu", torch.bfloat16):
        plain, native = messages(nn.Linear(6, 4), lambda net: backward(net, x.float()), scaler=scaler)
    torch.testing.assert_close(native, plain)


def test_means_that_are_not_finite_say_nothing():
    x, _ = data(0, 0)
    for value in (torch.inf, torch.nan):
        plain, native = messages(build(), lambda net, value=value: net(x * value).sum().backward())
        assert not plain.any() and not native.any()
