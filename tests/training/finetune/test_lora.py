"""LoRA of stage two: whose it is, what a failure leaves of it, and what resuming accepts."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

import diffusers_graft as dg
from diffusers_graft.errors import StateError, TrainingError

from ...models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit

LORA = LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.5)


class StopError(Exception):
    pass


class StopAt:
    def __init__(self, step):
        self.step = step

    def on_train_begin(self, args, state, control, **_):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise StopError


def grafted():
    model = tiny_dit()
    model.set_graft({"self_attention[1]": "hyena_x"})
    return model


def settle(model, *, stop=None, output_dir=None, resume=False, **settings):
    config = dg.FinetuneConfig(**{"steps": 4, "save_every": 1, "progress": False, **settings})
    callbacks = [] if stop is None else [StopAt(stop)]
    return dg.finetune(
        model, batches(1), config, noise_scheduler=SCHEDULER, output_dir=output_dir, resume=resume, callbacks=callbacks
    )


def test_its_dropout_rests_in_a_model_that_evaluates():
    model = grafted()
    settle(model, lora=LORA, steps=1)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("train", ["operators", "all"])
def test_lora_of_somebody_else_is_refused(train, tmp_path):
    model = tiny_dit()
    inject_adapter_in_model(LORA, model)
    tensors = tensors_of(model)
    model.set_graft({"self_attention[1]": "sliding_window"})
    with pytest.raises(StateError, match="LoRA layers that are not the graft's"):
        settle(model, train=train)
    with pytest.raises(StateError, match="LoRA layers that are not the graft's"):
        model.save_graft(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    model.unset_graft()
    assert same_tensors(model, tensors)


def test_a_graft_does_not_load_beside_lora_of_somebody_else_and_leaves_it(tmp_path):
    model = grafted()
    settle(model, lora=LORA, steps=1)
    model.save_graft(tmp_path)
    other = tiny_dit()
    inject_adapter_in_model(LORA, other)
    tensors = tensors_of(other)
    with pytest.raises(StateError, match="LoRA layers that are not the graft's"):
        other.load_graft(tmp_path)
    assert same_tensors(other, tensors)


def test_trained_projections_are_loaded_under_lora_of_somebody_else(tmp_path):
    model = grafted()
    settle(model, train="operators", lr=1e-2)
    model.save_graft(tmp_path)
    other = tiny_dit()
    inject_adapter_in_model(LORA, other.eval())
    other.eval().load_graft(tmp_path)
    assert torch.equal(predict(other), predict(model))  # that LoRA has learned nothing yet


@pytest.mark.parametrize("train", ["operators+lora", "all"])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"optimizer_args": {"typo": 1}}, TrainingError),
        ({"stop": 0}, StopError),
        ({"gradient_checkpointing": True}, TrainingError),
    ],
)
def test_a_failure_before_the_first_step_leaves_nothing_behind(fault, error, train, monkeypatch):
    model = grafted()
    monkeypatch.setattr(type(model), "_supports_gradient_checkpointing", False)
    before, tensors, flags = (
        predict(model),
        tensors_of(model),
        {name: p.requires_grad for name, p in model.named_parameters()},
    )
    with pytest.raises(error):
        settle(model, train=train, **fault)
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not model.training
    assert not model.graft.adapters
    assert not model.graft.body
    settle(model, train=train)


def test_a_run_that_failed_goes_on_in_the_same_process(tmp_path):
    torch.manual_seed(0)
    whole = grafted()
    settle(whole, lora=LORA)
    torch.manual_seed(0)
    model = grafted()
    with pytest.raises(StopError):
        settle(model, lora=LORA, stop=3, output_dir=tmp_path)
    settle(model, lora=LORA, output_dir=tmp_path, resume=True)
    assert torch.equal(predict(model), predict(whole))


@pytest.mark.parametrize(
    "other", [{"target_modules": ["to_k"]}, {"use_rslora": True}, {"rank_pattern": {"0.attn1.to_q": 3}}]
)
def test_a_checkpoint_of_other_lora_is_refused(other, tmp_path):
    settle(grafted(), lora=LORA, output_dir=tmp_path, steps=1)
    changed = LoraConfig(**{"r": 2, "target_modules": ["to_q"], "lora_dropout": 0.5, **other})
    with pytest.raises(StateError, match="made by another run: config.lora"):
        settle(grafted(), lora=changed, output_dir=tmp_path, steps=1, resume=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "leave out init_lora_weights='pissa'"),
        ({"bias": "all"}, "leave out bias='all'"),
        ({"lora_bias": True}, "leave out lora_bias=True"),
        ({"modules_to_save": ["proj_out_2"]}, "leave out modules_to_save"),
        ({"target_modules": ["nothing"]}, "does not fit DiTTransformer2DModel: No modules were targeted"),
    ],
)
def test_lora_that_a_graft_could_not_carry_is_refused_before_it_is_trained(settings, words):
    model = grafted()
    before = tensors_of(model)
    with pytest.raises(TrainingError, match=words):
        settle(model, lora=LoraConfig(**{"target_modules": "all-linear", **settings}))
    assert same_tensors(model, before)
    settle(model, steps=1)


def test_lora_goes_on_all_linear_layers_unless_told():
    model = grafted()
    settle(model, lora=LoraConfig(r=2), steps=1)
    assert {"transformer_blocks.0.attn1.to_q", "transformer_blocks.3.ff.net.2"} <= model.graft.adapters.keys()


def test_the_initial_weights_follow_the_seed_and_leave_the_global_generator_alone():
    starts = []
    for seed, global_seed in ((3, 1), (3, 2), (4, 1)):
        model = grafted()
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        settle(model, lora=LORA, steps=1, lr=1e-30, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name]))
    torch.testing.assert_close(starts[0], starts[1])
    assert (starts[0] - starts[2]).abs().max() > 0.1
