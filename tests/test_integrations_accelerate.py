"""Accelerate on two workers: after prepare(), with its clipping, accumulation and states, as with plain DDP."""

from __future__ import annotations

import warnings

import models
import owning
import pytest
import torch
import torch.nn.functional as F
from frameworks import COMPRESSORS, as_torchrun, averages, check_replicas, optimizer_for, options, same

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

import dear
from dear.integrations.accelerate import attach, inner_optimizer

pytestmark = pytest.mark.slow


def loader(rank=0):
    torch.manual_seed(5)
    data = torch.utils.data.TensorDataset(torch.randn(96, 16), torch.randn(96, 8))
    return torch.utils.data.DataLoader(data, batch_size=8, shuffle=False)


class Training:
    """A loop as Accelerate's documentation has it."""

    def __init__(self, name=None, seed=0, kind=None, compile_with=None, **accelerator):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        self.accelerator = Accelerator(cpu=True, **accelerator)
        torch.manual_seed(seed)
        net = models.Mlp()
        if compile_with is not None:
            net = torch.compile(net, backend=compile_with)
        made = (kind or optimizer_for(name))(net.parameters(), lr=0.01)
        inner = getattr(made, "optimizers", [made])
        scheduler = torch.optim.lr_scheduler.StepLR(inner[0], 4, 0.5)
        self.model, self.loader, self.scheduler, *self.optimizers = self.accelerator.prepare(
            net, loader(), scheduler, *inner
        )
        self.optimizer = self.optimizers[0]
        self.engine = attach(self.accelerator, self.model, self.optimizers, **options(name)) if name else None
        self.norms = []

    def train(self, batches, clip=None, clip_value=None):
        for index, (x, y) in enumerate(self.loader):
            if index not in batches:
                continue
            with self.accelerator.accumulate(self.model):
                loss = F.mse_loss(self.model(x), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and clip is not None:
                    self.norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), clip).item())
                if self.accelerator.sync_gradients and clip_value is not None:
                    self.accelerator.clip_grad_value_(self.model.parameters(), clip_value)
                for optimizer in self.optimizers:
                    optimizer.step()
                self.scheduler.step()
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
        return self

    def parameters(self):
        return {name: value.clone() for name, value in self.accelerator.unwrap_model(self.model).state_dict().items()}


FEATURES = {
    "plain": ({}, {}),
    "clip": ({}, {"clip": 0.05}),
    "clip by value": ({}, {"clip_value": 0.01}),
    "accumulate": ({"gradient_accumulation_steps": 2}, {}),
    "bf16": ({"mixed_precision": "bf16"}, {}),
    "all": ({"gradient_accumulation_steps": 3, "mixed_precision": "bf16"}, {"clip": 0.05}),
}


def loss_on_all(run):
    """The loss of a run's model on all of the data."""
    x, y = loader().dataset.tensors
    with torch.no_grad():
        return F.mse_loss(run.accelerator.unwrap_model(run.model)(x), y).item()


def trained(rank, world, name, feature):
    with as_torchrun(rank, world):
        accelerator, loop = FEATURES[feature]
        want = Training(kind=optimizer_for(name), **accelerator).train(range(6), **loop)
        have = Training(name, **accelerator).train(range(6), **loop)
        same(have.parameters(), want.parameters(), feature not in ("clip", "all"), feature)
        assert have.norms == pytest.approx(want.norms, rel=1e-5)
        assert have.engine.stats()["steps"] == (6 if "gradient_accumulation_steps" not in accelerator else
                                                6 // accelerator["gradient_accumulation_steps"])  # fmt: skip
        have.engine.detach()


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", ["sharded", "replicated", "owned"])
def test_features(pool2, name, feature):
    pool2.run(trained, name, feature)


def compressed(rank, world, name, clip):
    """All features at once under a compressor: replicas stay equal, and the loss falls as plain DDP's does."""
    with as_torchrun(rank, world):
        plain = Training(gradient_accumulation_steps=2, mixed_precision="bf16")
        have = Training(name, gradient_accumulation_steps=2, mixed_precision="bf16")
        largest = []
        inner_optimizer(have.optimizer).register_step_pre_hook(
            lambda optimizer, *_: largest.append(max(float(p.grad.abs().max()) for p in have.model.parameters()))
        )
        for run in (plain, have):
            for _ in range(6):
                run.train(range(6), **clip)
        assert len(largest) == 18
        if "clip_value" in clip:
            assert max(largest) == pytest.approx(clip["clip_value"])
        check_replicas(have.parameters())
        first, last, wanted = (loss_on_all(run) for run in (Training(), have, plain))
        assert first - last > 0.25 * (first - wanted) > 0, (first, last, wanted)
        if "clip" in clip:
            assert len(have.norms) == len(plain.norms) and all(norm > 0 for norm in have.norms)


@pytest.mark.parametrize("name", [*COMPRESSORS, "hook-power", "hook-topk"])
def test_compressors_with_all_features(pool2, name):
    pool2.run(compressed, name, {"clip": 0.5})


@pytest.mark.parametrize("name", ["power", "topk", "sign", "hook-power", "hook-topk"])
def test_compressors_and_clipping_by_value(pool2, name):
    pool2.run(compressed, name, {"clip_value": 0.02})


def averaged(rank, world, name):
    """An exponential moving average beside the training, updated from the module inside."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    with as_torchrun(rank, world):
        history, results = [], []
        for each in (None, name):
            run = Training(each, kind=optimizer_for(name))
            ema = AveragedModel(run.accelerator.unwrap_model(run.model), multi_avg_fn=get_ema_multi_avg_fn(0.9))
            for index in range(6):
                run.train([index])
                ema.update_parameters(run.accelerator.unwrap_model(run.model))
                history.append(run.parameters())
            results.append({key: value.clone() for key, value in ema.module.state_dict().items()})
        if name in ("sharded", "replicated", "owned"):
            same(results[1], results[0])
        same(results[1], averages(history[6:], 0.9))


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", *COMPRESSORS, "hook-power"])
def test_ema(pool2, name):
    pool2.run(averaged, name)


def compiled(rank, world, name):
    """The model is compiled before prepare(), by a backend that counts."""
    with as_torchrun(rank, world):
        results = []
        kind = optimizer_for(name)
        # With buckets smaller than DDP's first one Dynamo refuses to split the graph, plain DDP's too.
        large = name if name in COMPRESSORS or name.startswith("hook-") else f"{name}-large"
        for each in (None, large):
            torch._dynamo.reset()
            graphs = []
            run = Training(
                each, kind=kind, compile_with=lambda graph, _, graphs=graphs: graphs.append(1) or graph.forward
            )
            results.append((run.train(range(6)).parameters(), len(graphs)))
        assert results[0][1] >= 1
        assert results[1][1] == results[0][1], "compiled as often as with plain DDP"
        check_replicas(results[1][0])
        uncompiled = Training(large, kind=kind).train(range(6)).parameters()
        same({key.replace("_orig_mod.", ""): value for key, value in results[1][0].items()}, uncompiled)
        if large != name:
            same(results[1][0], results[0][0])


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", "power", "topk", "hook-power"])
def test_compile(pool2, name):
    pool2.run(compiled, name)


def scaled(rank, world, name):
    """Accelerate makes no GradScaler on a CPU; one as it makes on a GPU, with a step that overflows."""
    with as_torchrun(rank, world):
        results = []
        how = options(name)
        if "compressor" in how:
            how["compressor"].nonfinite = "propagate"
        for each in (None, name):
            run = Training(None, kind=optimizer_for(name))
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
            run.accelerator.scaler = scaler
            run.optimizer = type(run.optimizer)(inner_optimizer(run.optimizer), scaler=scaler)
            run.accelerator._optimizers = [run.optimizer]
            engine = attach(run.accelerator, run.model, run.optimizer, **how) if each else None
            skipped, before = [], loss_on_all(run)
            for index, (x, y) in enumerate(run.loader):
                loss = F.mse_loss(run.model(x), y) * (1e38 if index == 2 and rank else 1)
                run.accelerator.backward(loss)
                run.optimizer.step()
                skipped.append(run.optimizer.step_was_skipped)
                run.optimizer.zero_grad()
            if isinstance(engine, dear.Engine):
                assert engine.stats()["steps"] == len(skipped) - 1
                engine.detach()
            elif engine is not None:  # a plain hook's
                engine.remove()
            results.append((run.parameters(), skipped, before - loss_on_all(run)))
        assert results[1][1] == results[0][1] and any(skipped)
        check_replicas(results[1][0])
        if "compressor" in how:
            assert results[1][2] > 0.25 * results[0][2] > 0, "the loss falls as with plain DDP"
        else:
            same(results[1][0], results[0][0])


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", *COMPRESSORS, "hook-power", "hook-topk"])
def test_grad_scaler(pool2, name):
    pool2.run(scaled, name)


def saved(rank, world, name, folder):
    with as_torchrun(rank, world):
        run = Training(name).train(range(3))
        run.accelerator.save_state(f"{folder}/state")
        run.accelerator.wait_for_everyone()
        want = run.train(range(3, 6)).parameters()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = Training(name, seed=3)
            again.accelerator.load_state(f"{folder}/state")
        assert not [w for w in caught if "error feedback" in str(w.message)]
        same(again.train(range(3, 6)).parameters(), want, what=name)
        run.accelerator.load_state(f"{folder}/state")  # in the run that goes on, too
        same(run.train(range(3, 6)).parameters(), want, what=name)
        if name == "sharded":
            plain = Training(None, seed=3)
            plain.accelerator.load_state(f"{folder}/state")
            same(plain.train(range(3, 6)).parameters(), want, what="plain DDP")
            plain.accelerator.save_state(f"{folder}/plain")
            plain.accelerator.wait_for_everyone()
            want = plain.train(range(2)).parameters()
            again = Training(name, seed=3)
            again.accelerator.load_state(f"{folder}/plain")
            same(again.train(range(2)).parameters(), want, what="of plain DDP")


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", *COMPRESSORS, "hook-power", "hook-topk"])
def test_a_state_is_loaded(pool2, name, tmp_path):
    pool2.run(saved, name, str(tmp_path))


def several(rank, world, name, folder):
    """Muon for matrices and AdamW for the rest: one list, stepped one after another, saved and loaded."""
    with as_torchrun(rank, world):
        want = Training(None, kind=owning.muon_and_adamw).train(range(6)).parameters()
        run = Training(name, kind=owning.muon_and_adamw).train(range(3))
        assert run.engine.update == name
        run.accelerator.save_state(f"{folder}/state")
        run.accelerator.wait_for_everyone()
        same(run.train(range(3, 6)).parameters(), want)
        again = Training(name, seed=3, kind=owning.muon_and_adamw)
        again.accelerator.load_state(f"{folder}/state")
        same(again.train(range(3, 6)).parameters(), want)


def test_several_optimizers(pool2, tmp_path):
    pool2.run(several, "owned", str(tmp_path))


def several_refused(rank, world):
    with as_torchrun(rank, world):
        for name in ("replicated", "power"):
            with pytest.raises(ValueError, match="takes one optimizer, not 2"):
                Training(name, kind=owning.muon_and_adamw)
        with pytest.raises(ValueError, match="each element on its own"):
            Training("sharded", kind=owning.muon_and_adamw)


def test_several_optimizers_are_refused(pool2):
    pool2.run(several_refused)


def without_feedback(rank, world, folder):
    with as_torchrun(rank, world):
        run = Training(None).train(range(2))
        run.accelerator.save_state(folder)
        run.accelerator.wait_for_everyone()
        run = Training("power")
        with pytest.warns(UserWarning, match="has no error feedback of the compressor"):
            run.accelerator.load_state(folder)


def test_a_state_without_error_feedback_is_told(pool2, tmp_path):
    pool2.run(without_feedback, str(tmp_path / "state"))


def ended(rank, world, folder):
    """After detach() the state is saved as plain DDP's."""
    with as_torchrun(rank, world):
        run = Training("sharded").train(range(3))
        run.engine.detach()
        run.accelerator.save_state(folder)
        run.accelerator.wait_for_everyone()
        state = torch.load(f"{folder}/optimizer.bin", weights_only=True)["state"]
        assert len(state) == len(list(run.model.parameters()))


def test_saving_after_the_end(pool2, tmp_path):
    pool2.run(ended, str(tmp_path / "state"))
