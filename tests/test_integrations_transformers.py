"""The Trainer of Transformers on two workers: its clipping, logs, checkpoints and resuming, as with plain DDP."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from frameworks import COMPRESSORS, as_torchrun, options, same

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from dear.integrations.transformers import DearCallback, attach

pytestmark = pytest.mark.slow


class Text(torch.utils.data.Dataset):
    """Random tokens, the same in every process."""

    def __init__(self, count=96):
        torch.manual_seed(5)
        self.tokens = torch.randint(0, 50, (count, 12))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def small():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 12, "n_embd": 24, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def make(folder, name=None, model=None, **arguments):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    arguments = {
        "output_dir": folder, "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.01, "seed": 1,
        "dataloader_pin_memory": False, **arguments,
    }  # fmt: skip
    trainer = Trainer(
        model=model if model is not None else small(), args=TrainingArguments(**arguments), train_dataset=Text(),
        eval_dataset=Text(16),
    )  # fmt: skip
    callback = attach(trainer, **options(name)) if name else None
    return trainer, callback


def result(trainer, **options):
    trainer.train(**options)
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, logged


FEATURES = {
    "no clipping": {"max_grad_norm": 0.0},
    "clip": {"max_grad_norm": 0.2},
    "accumulate": {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "max_steps": 4},
    "bf16": {"bf16": True, "max_grad_norm": 0.0},
    "all": {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.2, "max_steps": 4},
}


def trained(rank, world, folder, name, feature):
    with as_torchrun(rank, world):
        want, norms = result(make(folder, **FEATURES[feature])[0])
        trainer, callback = make(folder, name, **FEATURES[feature])
        have, logged = result(trainer)
        same(have, want, feature not in ("clip", "all") and name == "replicated", feature)
        assert logged == pytest.approx(norms, rel=1e-4) and len(logged) == FEATURES[feature].get("max_steps", 8)
        with pytest.raises(RuntimeError, match="no engine now"):
            _ = callback.engine


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", ["sharded", "replicated"])
def test_features(pool2, tmp_path, name, feature):
    pool2.run(trained, str(tmp_path), name, feature)


def resumed(rank, world, folder, name):
    with as_torchrun(rank, world):
        how = {"save_strategy": "steps", "save_steps": 4, "max_grad_norm": 0.2}
        trainer, _ = make(f"{folder}/a", name, **how)
        want, _ = result(trainer)
        assert os.path.exists(f"{folder}/a/checkpoint-4/dear.pt")
        model = small()
        torch.nn.init.zeros_(next(model.parameters()))
        trainer, _ = make(f"{folder}/a", name, model, **how)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            have, _ = result(trainer, resume_from_checkpoint=f"{folder}/a/checkpoint-4")
        assert not [w for w in caught if "error feedback" in str(w.message)]
        same(have, want, what=name)
        if name == "sharded":
            have, _ = result(make(f"{folder}/a", None, **how)[0], resume_from_checkpoint=f"{folder}/a/checkpoint-4")
            same(have, want, exact=False, what="plain DDP")


@pytest.mark.parametrize("name", ["sharded", "replicated", *COMPRESSORS, "hook-power"])
def test_a_checkpoint_is_resumed(pool2, tmp_path, name):
    pool2.run(resumed, str(tmp_path), name)


def best(rank, world, folder):
    """The best model's checkpoint, and evaluation in between."""
    with as_torchrun(rank, world):
        how = {
            "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss",
            "load_best_model_at_end": True, "max_grad_norm": 0.0,
        }  # fmt: skip
        want, _ = result(make(f"{folder}/a", None, **how)[0])
        trainer, _ = make(f"{folder}/b", "sharded", **how)
        have, _ = result(trainer)
        same(have, want, exact=False)
        state = torch.load(f"{trainer.state.best_model_checkpoint}/optimizer.pt", weights_only=True)
        assert len(state["state"]) == len(list(trainer.model.parameters()))


def test_the_best_model(pool2, tmp_path):
    pool2.run(best, str(tmp_path))


def without_feedback(rank, world, folder):
    with as_torchrun(rank, world):
        how = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
        result(make(folder, None, **how)[0])
        trainer, _ = make(folder, "power", **(how | {"max_steps": 6}))
        with pytest.warns(UserWarning, match="has no error feedback of the compressor"):
            result(trainer, resume_from_checkpoint=f"{folder}/checkpoint-4")


def test_a_checkpoint_without_error_feedback_is_told(pool2, tmp_path):
    pool2.run(without_feedback, str(tmp_path))


def lora(rank, world, folder):
    import peft

    def adapted():
        torch.manual_seed(0)
        return peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["c_attn"]))

    with as_torchrun(rank, world):
        how = {"max_grad_norm": 0.0}
        want, _ = result(make(folder, None, adapted(), **how)[0])
        have, _ = result(make(folder, "sharded", adapted(), **how)[0])
        same(have, want)
        assert isinstance(make(folder, "sharded", adapted())[1], DearCallback)


def test_lora(pool2, tmp_path):
    pytest.importorskip("peft")
    pool2.run(lora, str(tmp_path))
