"""What "auto" has found goes with every framework's checkpoint: a resumed run does not search again."""

from __future__ import annotations

import pytest
import torch
from auto_instruments import SLOW, Prescribed
from frameworks import as_torchrun, check_replicas, same

from dear.integrations.accelerate import attach
from planner.auto import Auto

pytestmark = pytest.mark.slow

DENSE = {"version": 1, "update": "replicated", "compressor": None, "bucket_cap_mb": 0.004, "seconds": 1.0, "workers": 2}
#: What the first run was given as its plan; another one would be chosen, or none.
PLANS = {"replicated": DENSE, "power": DENSE | {"compressor": "power:4"}, "ddp": DENSE | {"update": "ddp"}}


def elements(model):
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def auto(plan=None):
    return Auto(0.08, plan, instruments=Prescribed(SLOW, lambda setting: 1.0))


def plan_for(name, model):
    return PLANS[name] | {"elements": elements(model)}


def in_lightning(rank, world, name, folder):
    import lightning.pytorch as pl
    from test_integrations_lightning import Net, SaveAt, fit

    from dear.integrations.lightning import DearCallback

    class Looking(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            plans.append(trainer.callbacks[0].engine.plan)

    with as_torchrun(rank, world):
        plan, path, plans = plan_for(name, Net()), f"{folder}/6.ckpt", []
        _, want = fit(Net(), callbacks=[DearCallback(compressor=auto(plan)), SaveAt(path, 6)])
        _, have = fit(Net(), callbacks=[DearCallback(compressor=auto()), Looking()], resume=path, seed=3)
        assert plans == [plan] * 6
        same(have, want)
        check_replicas(have)


def in_accelerate(rank, world, name, folder):
    from test_integrations_accelerate import Training

    def train(given, seed):
        run = Training(None, seed)
        run.engine = attach(run.accelerator, run.model, run.optimizers, compressor=auto(given))
        return run

    with as_torchrun(rank, world):
        first = train(plan := plan_for(name, Training().model), 0).train(range(3))
        first.accelerator.save_state(folder)
        want = first.train(range(3, 6)).parameters()
        resumed = train(None, 3)
        resumed.accelerator.load_state(folder)
        assert resumed.engine.plan == plan
        same(resumed.train(range(3, 6)).parameters(), want)


def in_transformers(rank, world, name, folder):
    from test_integrations_transformers import make, small
    from transformers import TrainerCallback

    import dear.integrations.transformers as integration

    class Looking(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            plans.append(callback.engine.plan)

    def state(trainer):
        return {key: value.clone() for key, value in trainer.model.state_dict().items()}

    with as_torchrun(rank, world):
        how, plan, plans = {"save_strategy": "steps", "save_steps": 4}, plan_for(name, small()), []
        trainer, _ = make(folder, **how)
        integration.attach(trainer, compressor=auto(plan))
        trainer.train()
        want = state(trainer)
        model = small()
        torch.nn.init.zeros_(next(model.parameters()))
        trainer, _ = make(folder, model=model, **how)
        callback = integration.attach(trainer, compressor=auto())
        trainer.add_callback(Looking())
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
        assert plans == [plan] * 4
        same(state(trainer), want)


@pytest.mark.parametrize("name", PLANS)
def test_lightning(pool2, name, tmp_path):
    pytest.importorskip("lightning")
    pool2.run(in_lightning, name, str(tmp_path))


@pytest.mark.parametrize("name", PLANS)
def test_accelerate(pool2, name, tmp_path):
    pytest.importorskip("accelerate")
    pool2.run(in_accelerate, name, str(tmp_path))


@pytest.mark.parametrize("name", PLANS)
def test_transformers(pool2, name, tmp_path):
    pytest.importorskip("transformers")
    pool2.run(in_transformers, name, str(tmp_path))
