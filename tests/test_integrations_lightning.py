"""Lightning's Trainer on two workers: under the callback and the strategy as with plain DDP."""

from __future__ import annotations

import warnings

import models
import pytest
import torch
import torch.nn.functional as F
from frameworks import COMPRESSORS, as_torchrun, options, same

pytest.importorskip("lightning")

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from dear.integrations.lightning import DearCallback, DearStrategy

pytestmark = pytest.mark.slow


class Net(pl.LightningModule):
    def __init__(self, kind=torch.optim.AdamW, lr=0.01, optimizers=1):
        super().__init__()
        self.net = models.Mlp()
        self.kind, self.lr, self.count = kind, lr, optimizers
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
        if self.count > 1:
            return [
                self.kind(self.net.first.parameters(), lr=self.lr),
                self.kind(self.net.last.parameters(), lr=self.lr),
            ]
        optimizer = self.kind(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def loader(batches=6):
    torch.manual_seed(5)
    data = torch.utils.data.TensorDataset(torch.randn(16 * batches, 16), torch.randn(16 * batches, 8))
    return torch.utils.data.DataLoader(data, batch_size=8, shuffle=False)


def fit(net, strategy="ddp", callbacks=(), folder=None, resume=None, seed=0, **trainer):
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
        plain, have = Net(), Net()
        _, want = fit(plain, **FEATURES[feature])
        _, got = fit(have, **with_library(how, name), **FEATURES[feature])
        exact = feature not in ("clip", "all")
        same(got, want, exact, feature)
        torch.testing.assert_close(have.norms, plain.norms)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", ["sharded", "replicated"])
def test_features(pool2, name, feature):
    pool2.run(trained, "callback", name, feature)


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
        _, want = fit(Net(), **arguments | {"callbacks": [saver, *arguments.get("callbacks", ())]}, **features)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, have = fit(Net(), **with_library(how, name), resume=path, seed=3, **features)
        assert not [w for w in caught if "error feedback" in str(w.message)]
        same(have, want, what=name)
        if also_plain:
            _, have = fit(Net(), resume=path, seed=3)  # plain DDP reads it
            same(have, want, what="plain DDP")
            _, want = fit(Net(), callbacks=[SaveAt(path, 6)])
            _, have = fit(Net(), **with_library(how, name), resume=path, seed=3)  # and the other way round
            same(have, want, what="of plain DDP")


@pytest.mark.parametrize("name", ["sharded", "replicated", *COMPRESSORS, "hook-power", "hook-topk"])
def test_a_checkpoint_is_resumed(pool2, name, tmp_path):
    pool2.run(checkpoints, "callback", name, str(tmp_path), name == "sharded")


def test_a_checkpoint_of_the_strategy_is_resumed(pool2, tmp_path):
    pool2.run(checkpoints, "strategy", "sharded", str(tmp_path), False)


def averaged(rank, world, name):
    """Lightning's own moving average of the weights."""
    with as_torchrun(rank, world):
        results = []
        for arguments in ({}, with_library("callback", name)):
            ema = pl.callbacks.EMAWeightAveraging(decay=0.9)
            results.append(fit(Net(), **arguments | {"callbacks": [ema, *arguments.get("callbacks", ())]})[1])
        same(results[1], results[0])


@pytest.mark.parametrize("name", ["sharded", "replicated"])
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


def kept(rank, world, folder):
    """ModelCheckpoint, validation in between, a second fit() and saving after it."""
    with as_torchrun(rank, world):
        results = []
        for arguments in ({}, with_library("callback", "sharded")):
            net = Net()
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
            results.append((net.state_dict(), float(saver.best_model_score)))
        same(results[1][0], results[0][0])
        assert results[1][1] == results[0][1]
        states = [torch.load(f"{folder}/{i}.ckpt", weights_only=False)["optimizer_states"] for i in (0, 1)]
        for index, state in states[0][0]["state"].items():
            assert torch.equal(state["exp_avg"], states[1][0]["state"][index]["exp_avg"])


def test_checkpoints_validation_and_a_second_fit(pool2, tmp_path):
    pool2.run(kept, str(tmp_path))


def failed(rank, world):
    with as_torchrun(rank, world):
        net = Net()
        net.fails_at = 3 if rank == 0 else None
        callback = DearCallback(**options("sharded"))
        with pytest.raises(KeyError if rank == 0 else RuntimeError) as caught:
            fit(net, callbacks=[callback])
        assert rank == 0 or "Rank 0" in str(caught.value) or "rank 0" in str(caught.value), caught.value
        with pytest.raises(RuntimeError, match="no engine now"):
            _ = callback.engine


def test_an_error_in_a_step_ends_every_rank(pool2):
    pool2.run(failed, group_timeout=20.0)


def misused(rank, world):
    with as_torchrun(rank, world):
        net = Net(optimizers=2)
        net.automatic_optimization = False
        with pytest.raises(ValueError, match="returned 2 optimizers"):
            fit(net, **with_library("callback", "sharded"))
        with pytest.raises(ValueError, match="pass compressor with it, and nothing else"):
            DearCallback(register=print, update="sharded")


def test_what_cannot_work_is_refused(pool2):
    pool2.run(misused)
