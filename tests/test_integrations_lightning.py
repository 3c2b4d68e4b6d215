"""Lightning's Trainer on two workers: under the callback and the strategy as with plain DDP."""

from __future__ import annotations

import warnings

import models
import owning
import pytest
import torch
import torch.nn.functional as F
from frameworks import COMPRESSORS, as_torchrun, averages, check_replicas, optimizer_for, options, same

pytest.importorskip("lightning")

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from dear.integrations.lightning import DearCallback, DearStrategy

pytestmark = pytest.mark.slow


class Net(pl.LightningModule):
    def __init__(self, kind=torch.optim.AdamW, lr=0.01, compile_with=None):
        super().__init__()
        self.net = models.Mlp()
        if compile_with is not None:
            self.net = torch.compile(self.net, backend=compile_with)
        self.kind, self.lr = kind, lr
        self.norms, self.fails_at = [], None

    def training_step(self, batch, index):
        if self.fails_at == self.global_step:
            raise KeyError("the user's own")
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        self.log("validation", F.mse_loss(self.net(x), y))

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    def configure_optimizers(self):
        optimizer = self.kind(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Several(Net):
    """Muon for matrices and AdamW for the rest, under manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        for optimizer in self.optimizers():
            optimizer.zero_grad()

    def configure_optimizers(self):
        return owning.muon_and_adamw(self.parameters()).optimizers


class Alternating(Net):
    """Two halves with a loss and an optimizer each, which step in turns, as a GAN's do."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        x, y = batch
        for number, optimizer in enumerate(self.optimizers()):
            loss = F.mse_loss(self.net(x), y) * (1 + number)
            self.manual_backward(loss)
            optimizer.step()
            for each in self.optimizers():
                each.zero_grad()

    def configure_optimizers(self):
        first = [self.kind(self.net.first.parameters(), lr=self.lr)]
        return [*first, self.kind([*self.net.second.parameters(), *self.net.last.parameters()], lr=self.lr)]


def loader(batches=6):
    torch.manual_seed(5)
    data = torch.utils.data.TensorDataset(torch.randn(16 * batches, 16), torch.randn(16 * batches, 8))
    return torch.utils.data.DataLoader(data, batch_size=8, shuffle=False)


def fit(net, strategy="ddp", callbacks=(), folder=None, resume=None, seed=0, before=lambda trainer: None, **trainer):
    if seed is not None:
        torch.manual_seed(seed)
        for part in net.net.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    trainer = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "plugins": [TorchElasticEnvironment()],
        "default_root_dir": folder, **trainer,
    }  # fmt: skip
    trainer = pl.Trainer(strategy=strategy, callbacks=list(callbacks), **trainer)
    before(trainer)
    trainer.fit(net, loader(), ckpt_path=resume, weights_only=False)
    return trainer, {name: value.clone() for name, value in net.state_dict().items()}


def with_library(how, name):
    """Arguments of fit()."""
    if how == "strategy":
        return {"strategy": DearStrategy(attach=options(name))}
    return {"callbacks": [DearCallback(**options(name))]}


FEATURES = {
    "plain": {},
    "clip": {"gradient_clip_val": 0.05},
    "clip by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "all": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3, "precision": "bf16-mixed"},
}


def trained(rank, world, how, name, feature):
    with as_torchrun(rank, world):
        plain, have = Net(optimizer_for(name)), Net(optimizer_for(name))
        _, want = fit(plain, **FEATURES[feature])
        _, got = fit(have, **with_library(how, name), **FEATURES[feature])
        exact = feature not in ("clip", "all")
        same(got, want, exact, feature)
        torch.testing.assert_close(have.norms, plain.norms)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", ["sharded", "replicated", "owned"])
def test_features(pool2, name, feature):
    pool2.run(trained, "callback", name, feature)


class Largest(pl.Callback):
    """The largest gradient that each step of the optimizer used."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, module):
        def note(*_):
            self.seen.append(max(float(p.grad.abs().max()) for p in module.parameters()))

        trainer.optimizers[0].register_step_post_hook(note)  # Lightning computes gradients inside the step


def loss_of(state):
    """On all of the data, with these parameters."""
    net = Net()
    net.load_state_dict(state)
    x, y = loader().dataset.tensors
    with torch.no_grad():
        return F.mse_loss(net.net(x), y).item()


def clipped_by_value(rank, world, name):
    """Gradients are clipped before the step under a compressor, too; replicas stay equal, and the loss falls."""
    with as_torchrun(rank, world):
        how = {**FEATURES["clip by value"], "max_epochs": 4}
        largest, arguments = Largest(), with_library("callback", name)
        _, have = fit(Net(), **arguments | {"callbacks": [*arguments["callbacks"], largest]}, **how)
        assert max(largest.seen) == pytest.approx(0.01) and len(largest.seen) == 24
        check_replicas(have)
        first, last, wanted = (loss_of(state) for state in (fit(Net(), max_epochs=0)[1], have, fit(Net(), **how)[1]))
        assert first - last > 0.25 * (first - wanted) > 0, (first, last, wanted)


@pytest.mark.parametrize("name", ["power", "topk", "sign", "hook-power", "hook-topk"])
def test_compressors_and_clipping_by_value(pool2, name):
    pool2.run(clipped_by_value, name)


def several(rank, world, name, kind, folder):
    """Several optimizers under manual optimization, as with plain DDP; saved in mid-epoch, and resumed."""
    with as_torchrun(rank, world):
        module = {"several": Several, "alternating": Alternating}[kind]
        _, want = fit(module())
        path = f"{folder}/after.ckpt"
        saver = SaveAt(path, 12)  # after an epoch: Lightning counts the steps of every optimizer
        _, have = fit(module(), callbacks=[saver, *with_library("callback", name)["callbacks"]])
        same(have, want, what=kind)
        assert saver.saved
        _, have = fit(module(), **with_library("callback", name), resume=path, seed=3)
        same(have, want, what=f"{kind}, resumed")
        _, have = fit(module(), resume=path, seed=3)
        same(have, want, what=f"{kind}, resumed by plain DDP")


@pytest.mark.parametrize(("name", "kind"), [("owned", "several"), ("sharded", "alternating")])
def test_several_optimizers(pool2, name, kind, tmp_path):
    pool2.run(several, name, kind, str(tmp_path))


def compiled(rank, world, name):
    """The module is compiled as often as with plain DDP, and trains as the uncompiled one."""
    with as_torchrun(rank, world):
        results, kind = [], optimizer_for(name)
        # With buckets smaller than DDP's first one Dynamo refuses to split the graph, plain DDP's too.
        large = name if name in COMPRESSORS or name.startswith("hook-") else f"{name}-large"
        for arguments in ({}, with_library("callback", large)):
            torch._dynamo.reset()
            graphs = []
            net = Net(kind, compile_with=lambda graph, _, graphs=graphs: graphs.append(1) or graph.forward)
            results.append((fit(net, **arguments)[1], len(graphs)))
        assert results[0][1] >= 1
        assert results[1][1] == results[0][1], "compiled as often as with plain DDP"
        check_replicas(results[1][0])
        uncompiled = fit(Net(kind), **with_library("callback", large))[1]
        same({key.replace("_orig_mod.", ""): value for key, value in results[1][0].items()}, uncompiled)
        if large != name:
            same(results[1][0], results[0][0])


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", "power", "hook-topk"])
def test_compile(pool2, name):
    pool2.run(compiled, name)


def test_strategy(pool2):
    pool2.run(trained, "strategy", "sharded", "all")


class SaveAt(pl.Callback):
    """A checkpoint in mid-epoch."""

    def __init__(self, path, step):
        self.path, self.step, self.saved = path, step, False

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == self.step and not self.saved:
            self.saved = True
            trainer.save_checkpoint(self.path)


def checkpoints(rank, world, how, name, folder, also_plain):
    with as_torchrun(rank, world):
        path = f"{folder}/after.ckpt"
        arguments = with_library(how, name)
        features = {} if also_plain else {**FEATURES["all"], "accumulate_grad_batches": 2}
        saver = SaveAt(path, 6 if also_plain else 3)
        kind = optimizer_for(name)
        _, want = fit(Net(kind), **arguments | {"callbacks": [saver, *arguments.get("callbacks", ())]}, **features)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, have = fit(Net(kind), **with_library(how, name), resume=path, seed=3, **features)
        assert not [w for w in caught if "error feedback" in str(w.message)]
        same(have, want, what=name)
        if also_plain:
            _, have = fit(Net(), resume=path, seed=3)  # plain DDP reads it
            same(have, want, what="plain DDP")
            _, want = fit(Net(), callbacks=[SaveAt(path, 6)])
            _, have = fit(Net(), **with_library(how, name), resume=path, seed=3)  # and the other way round
            same(have, want, what="of plain DDP")


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", *COMPRESSORS, "hook-power", "hook-topk"])
def test_a_checkpoint_is_resumed(pool2, name, tmp_path):
    pool2.run(checkpoints, "callback", name, str(tmp_path), name == "sharded")


def test_a_checkpoint_of_the_strategy_is_resumed(pool2, tmp_path):
    pool2.run(checkpoints, "strategy", "sharded", str(tmp_path), False)


class Steps(pl.Callback):
    """The parameters after each step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.states.append({name: value.clone() for name, value in module.state_dict().items()})


def averaged(rank, world, name):
    """Lightning's own moving average of the weights."""
    with as_torchrun(rank, world):
        results, kind = [], optimizer_for(name)
        for arguments in ({}, with_library("callback", name)):
            ema = pl.callbacks.EMAWeightAveraging(decay=0.9)
            results.append(fit(Net(kind), **arguments | {"callbacks": [ema, *arguments.get("callbacks", ())]})[1])
        if name in ("sharded", "replicated", "owned"):
            same(results[1], results[0])
        steps = Steps()
        fit(Net(kind), callbacks=[steps, *with_library("callback", name)["callbacks"]])
        same(results[1], averages(steps.states, 0.9), exact=False)  # Lightning adds two products, and this is a lerp


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", *COMPRESSORS, "hook-power"])
def test_ema(pool2, name):
    pool2.run(averaged, name)


def without_feedback(rank, world, folder):
    with as_torchrun(rank, world):
        path = f"{folder}/plain.ckpt"
        fit(Net(), callbacks=[SaveAt(path, 6)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Net(), **with_library("callback", "power"), resume=path)
        told = [str(w.message) for w in caught if "error feedback" in str(w.message)]
        assert len(told) == 1 and "plain.ckpt has no error feedback" in told[0], told


def test_a_checkpoint_without_error_feedback_is_told(pool2, tmp_path):
    pool2.run(without_feedback, str(tmp_path))


def kept(rank, world, name, folder):
    """ModelCheckpoint, validation in between, a second fit() and saving after it."""
    with as_torchrun(rank, world):
        results = []
        for arguments in ({}, with_library("callback", name)):
            net = Net(optimizer_for(name))
            saver = pl.callbacks.ModelCheckpoint(f"{folder}/{len(results)}", save_last=True, monitor="validation")
            callbacks = [saver, *arguments.get("callbacks", ())]
            torch.manual_seed(0)
            trainer = pl.Trainer(
                max_epochs=2, accelerator="cpu", devices=2, logger=False, enable_progress_bar=False, strategy="ddp",
                enable_model_summary=False, callbacks=callbacks, plugins=[TorchElasticEnvironment()],
                num_sanity_val_steps=1,
            )  # fmt: skip
            for part in net.net.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
            trainer.fit(net, loader(), loader(2))
            trainer.save_checkpoint(f"{folder}/{len(results)}.ckpt")
            trainer.validate(net, loader(2), verbose=False)
            trainer.fit_loop.max_epochs = 3
            trainer.fit(net, loader(), loader(2))
            best = torch.load(saver.best_model_path, weights_only=False)["state_dict"]
            results.append((net.state_dict(), float(saver.best_model_score), best))
        check_replicas(results[1][0])
        if name not in ("sharded", "replicated", "owned"):
            assert loss_of(results[1][0]) < loss_of(fit(Net(), max_epochs=0)[1])
            return
        same(results[1][0], results[0][0])
        same(results[1][2], results[0][2])
        assert results[1][1] == results[0][1]
        states = [torch.load(f"{folder}/{i}.ckpt", weights_only=False)["optimizer_states"] for i in (0, 1)]
        for index, state in states[0][0]["state"].items():
            for key, value in state.items():
                assert torch.equal(value, states[1][0]["state"][index][key]), key


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", "power", "topk", "hook-power"])
def test_checkpoints_validation_and_a_second_fit(pool2, name, tmp_path):
    pool2.run(kept, name, str(tmp_path))


def failed(rank, world, name):
    with as_torchrun(rank, world):
        net = Net(optimizer_for(name))
        net.fails_at = 3 if rank == 0 else None
        callback = DearCallback(**options(name))
        with pytest.raises(KeyError if rank == 0 else RuntimeError) as caught:
            fit(net, callbacks=[callback])
        assert rank == 0 or "Rank 0" in str(caught.value) or "rank 0" in str(caught.value), caught.value
        with pytest.raises(RuntimeError, match="no engine now"):
            _ = callback.engine


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", "power", "topk"])
def test_an_error_in_a_step_ends_every_rank(pool2, name):
    pool2.run(failed, name, group_timeout=20.0)


def misused(rank, world):
    with as_torchrun(rank, world):
        with pytest.raises(ValueError, match="pass compressor with it, and nothing else"):
            DearCallback(register=print, update="sharded")
        for name in ("replicated", "power"):
            with pytest.raises(ValueError, match="takes one optimizer, not 2"):
                fit(Several(), **with_library("callback", name))


def test_what_cannot_work_is_refused(pool2):
    pool2.run(misused)
