"""A GradScaler in Lightning's and the Trainer's hands. Both make one on GPUs alone: here it is one of host tensors, and
steps overflow on one rank, which every rank must leave out."""

from __future__ import annotations

import pytest
import torch
from frameworks import COMPRESSORS, as_torchrun, check_replicas, optimizer_for, options, same

pytestmark = pytest.mark.slow

OVERFLOWS = 3  # the step
NAMES = ["sharded", "replicated", "owned", *COMPRESSORS, "hook-power", "hook-topk"]


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)


def how(name):
    """A compressor hands on what is not finite, for the scaler to see."""
    found = options(name)
    if "compressor" in found:
        found["compressor"].nonfinite = "propagate"
    return found


def compare(results, name, fell):
    """The scale and, without a compressor, the parameters are plain DDP's; else replicas are equal, and the loss
    falls."""
    (want, wanted_scale), (have, scale) = results
    assert scale == wanted_scale < 2.0**11, "an overflow halves it"
    check_replicas(have)
    if name in ("sharded", "replicated", "owned"):
        same(have, want)
    else:
        assert fell(have) > 0.25 * fell(want) > 0


def in_lightning(rank, world, name, clip):
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.plugins.precision import MixedPrecision
    from test_integrations_lightning import Net, fit, loss_of

    from dear.integrations.lightning import DearCallback

    class Overflowing(Net):
        def training_step(self, batch, index):
            return super().training_step(batch, index) * (1e38 if index == OVERFLOWS and self.global_rank else 1)

        def on_before_optimizer_step(self, optimizer):
            pass

    with as_torchrun(rank, world):
        results = []
        for callbacks in ([], [DearCallback(**how(name))]):
            precision = MixedPrecision("16-mixed", "cpu", scaler())
            plugins = [TorchElasticEnvironment(), precision]
            net = Overflowing(optimizer_for(name))
            _, state = fit(net, callbacks=callbacks, plugins=plugins, gradient_clip_val=clip, max_epochs=3)
            results.append((state, precision.scaler.get_scale()))
        before = loss_of(fit(Net(), max_epochs=0)[1])
        if clip is None or name in COMPRESSORS:
            compare(results, name, lambda state: before - loss_of(state))
        else:
            same(results[1][0], results[0][0], exact=False)


@pytest.mark.parametrize("name", NAMES)
def test_lightning(pool2, name):
    pytest.importorskip("lightning")
    pool2.run(in_lightning, name, None)


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", "power"])
def test_lightning_clips(pool2, name):
    pytest.importorskip("lightning")
    pool2.run(in_lightning, name, 0.05)


def in_transformers(rank, world, name, folder):
    from test_integrations_transformers import loss_of, make, small
    from transformers import TrainerCallback

    from dear.integrations.transformers import attach

    class Overflow(TrainerCallback):
        """The loss of one step, on one rank, is too large for its gradients."""

        def __init__(self, trainer):
            self.trainer = trainer

        def on_step_begin(self, args, state, control, **kwargs):
            self.trainer.factor = 1e38 if state.global_step == OVERFLOWS and rank else 1

    with as_torchrun(rank, world):
        results = []
        for attaches in (False, True):
            trainer, _ = make(
                folder, None, None, optimizer_for(name), max_grad_norm=0.0, max_steps=10, optim="adamw_torch"
            )
            trainer.accelerator.scaler, trainer.factor = scaler(), 1
            compute = trainer.compute_loss
            trainer.compute_loss = lambda *args, t=trainer, c=compute, **kwargs: c(*args, **kwargs) * t.factor
            trainer.add_callback(Overflow(trainer))
            if attaches:
                attach(trainer, **how(name))
            trainer.train()
            state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
            results.append((state, trainer.accelerator.scaler.get_scale()))
        before = loss_of(small().state_dict())
        compare(results, name, lambda state: before - loss_of(state))


@pytest.mark.parametrize("name", NAMES)
def test_transformers(pool2, name, tmp_path):
    pytest.importorskip("transformers")
    pool2.run(in_transformers, name, str(tmp_path))
