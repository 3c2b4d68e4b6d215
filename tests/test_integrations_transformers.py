"""The Trainer of Transformers on two workers: its clipping, logs, checkpoints and resuming, as with plain DDP."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from frameworks import COMPRESSORS, as_torchrun, check_replicas, optimizer_for, options, same

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import dear
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


def make(folder, name=None, model=None, kind=None, **arguments):
    kind = kind or optimizer_for(name)
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
        optimizer_cls_and_kwargs=None if kind is torch.optim.AdamW else (kind, {"lr": 0.01}),
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
    # A norm is summed in another order on shards. Its last bit comes to 4e-9 in the second step and, since bf16 rounds
    # to one side or the other, to 1e-3 in the fourth. Each of the three alone is compared for longer.
    "all": {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.2, "max_steps": 2},
}


def trained(rank, world, folder, name, feature):
    with as_torchrun(rank, world):
        want, norms = result(make(folder, kind=optimizer_for(name), **FEATURES[feature])[0])
        trainer, callback = make(folder, name, **FEATURES[feature])
        have, logged = result(trainer)
        same(have, want, feature not in ("clip", "all"), feature)
        assert logged == pytest.approx(norms, rel=1e-4) and len(logged) == FEATURES[feature].get("max_steps", 8)
        with pytest.raises(RuntimeError, match="no engine now"):
            _ = callback.engine


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", ["sharded", "replicated", "owned"])
def test_features(pool2, tmp_path, name, feature):
    pool2.run(trained, str(tmp_path), name, feature)


def loss_of(state):
    """On some of the data, with these parameters."""
    model = small()
    model.load_state_dict(state)
    tokens = Text(32).tokens
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()


def compressed(rank, world, folder, name, feature):
    """Under a compressor: replicas stay equal, the norm is logged, and the loss falls as plain DDP's does."""
    with as_torchrun(rank, world):
        how = FEATURES[feature] | {"max_steps": 12}
        want, _ = result(make(folder, **how)[0])
        have, logged = result(make(folder, name, **how)[0])
        assert len(logged) == 12 and all(norm > 0 for norm in logged)
        check_replicas(have)
        first, last, wanted = loss_of(small().state_dict()), loss_of(have), loss_of(want)
        assert first - last > 0.25 * (first - wanted) > 0, (first, last, wanted)


@pytest.mark.parametrize("feature", ["accumulate", "bf16", "all"])
@pytest.mark.parametrize("name", ["power", "topk", "hook-power"])
def test_features_with_a_compressor(pool2, tmp_path, name, feature):
    pool2.run(compressed, str(tmp_path), name, feature)


def compiled(rank, world, folder, name):
    """As often as with plain DDP, and training is that of the uncompiled model."""
    with as_torchrun(rank, world):
        results, kind = [], optimizer_for(name)
        # With buckets smaller than DDP's first one Dynamo refuses to split the graph, plain DDP's too.
        large = name if name in COMPRESSORS or name.startswith("hook-") else f"{name}-large"
        how = {"max_grad_norm": 0.0, "max_steps": 4}
        for each in (None, large):
            torch._dynamo.reset()
            graphs = []
            model = small()  # compiled in place: the Trainer looks at its forward's signature
            model.compile(backend=lambda graph, _, graphs=graphs: graphs.append(1) or graph.forward)
            trainer, _ = make(folder, each, model, kind, **how)
            results.append((result(trainer)[0], len(graphs)))
        assert results[0][1] >= 1
        assert results[1][1] == results[0][1], "compiled as often as with plain DDP"
        check_replicas(results[1][0])
        uncompiled, _ = result(make(folder, large, None, kind, **how)[0])
        same(results[1][0], uncompiled, exact=False)
        if large != name:
            same(results[1][0], results[0][0], exact=False)


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", "power", "hook-topk"])
def test_compile(pool2, tmp_path, name):
    pool2.run(compiled, str(tmp_path), name)


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


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", *COMPRESSORS, "hook-power"])
def test_a_checkpoint_is_resumed(pool2, tmp_path, name):
    pool2.run(resumed, str(tmp_path), name)


def resumed_elsewhere(rank, world, folder):
    """From a folder that is not of this run."""
    with as_torchrun(rank, world):
        how = {"save_strategy": "steps", "save_steps": 4}
        want, _ = result(make(f"{folder}/a", "power", **how)[0])
        trainer, _ = make(f"{folder}/b", "power", **how)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            have, _ = result(trainer, resume_from_checkpoint=f"{folder}/a/checkpoint-4")
        assert not [w for w in caught if "error feedback" in str(w.message)]
        same(have, want)


def test_a_checkpoint_of_another_folder_is_resumed(pool2, tmp_path):
    pool2.run(resumed_elsewhere, str(tmp_path))


class Asking(TrainerCallback):
    """Asks for a checkpoint after the fourth step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 4
        return control


def asked(rank, world, folder, name):
    """By a callback that was added after ours."""
    with as_torchrun(rank, world):
        trainer, _ = make(folder, name, max_grad_norm=0.2)
        trainer.add_callback(Asking())
        want, _ = result(trainer)
        trainer, _ = make(folder, name, max_grad_norm=0.2)
        have, _ = result(trainer, resume_from_checkpoint=f"{folder}/checkpoint-4")
        same(have, want, what=name)


@pytest.mark.parametrize("name", ["sharded", "power"])
def test_a_callback_asks_for_a_checkpoint(pool2, tmp_path, name):
    pool2.run(asked, str(tmp_path), name)


def best(rank, world, folder, name):
    """The best model's checkpoint, and evaluation in between."""
    with as_torchrun(rank, world):
        how = {
            "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss",
            "load_best_model_at_end": True, "max_grad_norm": 0.0,
        }  # fmt: skip
        want, _ = result(make(f"{folder}/a", kind=optimizer_for(name), **how)[0])
        trainer, _ = make(f"{folder}/b", name, **how)
        have, _ = result(trainer)
        check_replicas(have)
        if name in ("sharded", "replicated", "owned"):
            same(have, want, exact=False)
        evaluated = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
        step = min(evaluated, key=evaluated.__getitem__)
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
        assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[step], rel=1e-6)
        state = torch.load(f"{trainer.state.best_model_checkpoint}/optimizer.pt", weights_only=True)
        assert len(state["state"]) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", "power", "topk", "hook-power"])
def test_the_best_model(pool2, tmp_path, name):
    pool2.run(best, str(tmp_path), name)


def without_feedback(rank, world, folder):
    with as_torchrun(rank, world):
        how = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
        result(make(folder, None, **how)[0])
        trainer, _ = make(folder, "power", **(how | {"max_steps": 6}))
        with pytest.warns(UserWarning, match="has no error feedback of the compressor"):
            result(trainer, resume_from_checkpoint=f"{folder}/checkpoint-4")


def test_a_checkpoint_without_error_feedback_is_told(pool2, tmp_path):
    pool2.run(without_feedback, str(tmp_path))


def lora(rank, world, folder, name):
    import peft

    def adapted():
        torch.manual_seed(0)
        return peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["c_attn"]))

    with as_torchrun(rank, world):
        how = {"max_grad_norm": 0.0}
        want, _ = result(make(folder, None, adapted(), optimizer_for(name), **how)[0])
        have, _ = result(make(folder, name, adapted(), **how)[0])
        if name in ("sharded", "replicated", "owned"):
            same(have, want, exact=name != "sharded")
        else:
            check_replicas(have)
            before = adapted().state_dict()
            changed = {key for key, value in have.items() if not torch.equal(value, before[key])}
            assert changed and all("lora" in key for key in changed)
        assert isinstance(make(folder, name, adapted())[1], DearCallback)


@pytest.mark.parametrize("name", ["sharded", "replicated", "owned", "power", "topk", "hook-power"])
def test_lora(pool2, tmp_path, name):
    pytest.importorskip("peft")
    pool2.run(lora, str(tmp_path), name)


def lora_fa(rank, world, folder, name):
    """PEFT's LoRA-FA: an optimizer of its own that updates half of the factors, and whose state is keyed by name."""
    import peft
    from peft.optimizers import create_lorafa_optimizer

    def run(name):
        torch.manual_seed(0)
        model = peft.get_peft_model(small(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"]))
        optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=0.01)
        model = torch.nn.parallel.DistributedDataParallel(model)
        engine = dear.attach(model, optimizer, **options(name)) if name else None
        tokens = Text().tokens
        for step in range(6):
            batch = tokens[8 * step + 4 * rank : 8 * step + 4 * rank + 4]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = {key: value.clone() for key, value in model.module.state_dict().items()}
        if engine is not None:
            assert engine.update == "replicated"
            engine.detach()
        return state

    with as_torchrun(rank, world):
        have, want = run(name), run(None)
        if name == "replicated":
            same(have, want)
        check_replicas(have)


@pytest.mark.parametrize("name", ["replicated", "power"])
def test_lora_fa(pool2, tmp_path, name):
    pytest.importorskip("peft")
    pool2.run(lora_fa, str(tmp_path), name)


def lora_fa_refused(rank, world, update):
    import peft
    from peft.optimizers import create_lorafa_optimizer

    with as_torchrun(rank, world):
        model = peft.get_peft_model(small(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"]))
        optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=0.01)
        model = torch.nn.parallel.DistributedDataParallel(model)
        if update == "sharded":
            with pytest.raises(ValueError, match="is not known to update each element on its own"):
                dear.attach(model, optimizer, update=update)
            return
        dear.attach(model, optimizer, update=update)
        batch = Text().tokens[:4]
        model(input_ids=batch, labels=batch).loss.backward()
        with pytest.raises(RuntimeError, match="option names of a parameter group"):
            optimizer.step()


@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_lora_fa_is_refused(pool2, update):
    """Its update of one factor needs the other."""
    pytest.importorskip("peft")
    pool2.run(lora_fa_refused, update)
