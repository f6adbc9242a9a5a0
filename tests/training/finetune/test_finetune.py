"""Stage two: what it trains, and that the original comes back."""

import math

import pytest
import torch
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.errors import StateError, TrainingError
from diffusers_graft.training.metrics_log import read_metrics
from diffusers_graft.training.noised_batch import Noising

from ...models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart
from ..runs import (
    RANDOM,
    CallsVerb,
    StopAt,
    StopError,
    build,
    finetune_config,
    grafted_model,
    interrupted,
    poisoned,
    run_finetune,
    same,
    weights_of,
)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "operators"},
        {"train": "all"},
        {"train": "all", "ema_decay": 0.9},
        {"train": "operators", "lora": LoraConfig(r=2, target_modules=["to_q", "proj"])},
    ],
    ids=["operators", "all", "ema", "lora"],
)
def test_the_original_comes_back_bit_for_bit_after_training(settings):
    model, graft = build({"self_attention[1::2]": RANDOM})
    before, tensors = predict(model), tensors_of(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.set_graft(graft)
    start = predict(model)
    losses = dg.finetune(model, batches(), finetune_config(8, **settings), noise_scheduler=SCHEDULER)
    settled = predict(model)
    assert len(losses) == 8
    assert not torch.equal(settled, start)
    assert not model.training
    model.disable_graft()
    assert torch.equal(predict(model), before)
    model.enable_graft()
    assert torch.equal(predict(model), settled)
    graft = model.unset_graft()
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    model.set_graft(graft)
    assert torch.equal(predict(model), settled)


def test_lora_leaves_operators_trainable():
    """peft freezes whatever it did not add."""
    model, graft = build({"self_attention[1::2]": RANDOM})
    model.set_graft(graft)
    before = {name: t.clone() for name, t in graft.tensors(model).items()}
    lora = LoraConfig(r=2, target_modules=["to_q"])
    dg.finetune(model, batches(), finetune_config(train="operators", lora=lora), noise_scheduler=SCHEDULER)
    after = graft.tensors(model)
    assert all(
        not torch.equal(after[name], tensor) for name, tensor in before.items() if not name.endswith("to_k.bias")
    )
    assert all(path.endswith("to_q") for path in graft.adapters)
    assert len(graft.adapters) == 2  # of the two attentions that were not grafted
    with pytest.raises(StateError, match="LoRA layers already"):
        dg.finetune(model, batches(), finetune_config(lora=lora), noise_scheduler=SCHEDULER)


def test_a_model_that_lost_a_trained_weight_is_left_as_it_is():
    model, graft = build({"self_attention[1]": RANDOM})
    model.set_graft(graft)
    dg.finetune(model, batches(1), finetune_config(1), noise_scheduler=SCHEDULER)
    model.proj_out_2, kept = torch.nn.Identity(), model.proj_out_2
    modules = dict(model.named_modules())
    with pytest.raises(StateError, match="proj_out_2.bias, which the model no longer has"):
        model.unset_graft()
    assert dict(model.named_modules()) == modules
    model.proj_out_2 = kept
    model.unset_graft()


def test_the_loss_falls():
    model, graft = build({"self_attention[:]": RANDOM})
    model.set_graft(graft)
    data = batches(1, size=16)
    before = dg.evaluate(model, data, noise_scheduler=SCHEDULER)["denoising_loss"]
    dg.finetune(model, data, finetune_config(60, lr=3e-3), noise_scheduler=SCHEDULER)
    assert dg.evaluate(model, data, noise_scheduler=SCHEDULER)["denoising_loss"] < before


def test_nan_and_ctrl_c_leave_finite_weights():
    model, graft = build({"self_attention[1]": RANDOM})
    before = predict(model)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match="loss is nan at step 1"):
        dg.finetune(model, poisoned(), finetune_config(), noise_scheduler=SCHEDULER)
    assert predict(model).isfinite().all()
    with pytest.raises(KeyboardInterrupt):
        dg.finetune(model, interrupted(), finetune_config(9), noise_scheduler=SCHEDULER)
    assert predict(model).isfinite().all()
    assert not model.training
    model.unset_graft()
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize("verb", ["unset_graft", "disable_graft"])
@pytest.mark.parametrize("step", [1, 2])
def test_the_original_is_not_trained_where_a_callback_removes_the_graft(verb, step):
    model, graft = build({"self_attention[1]": RANDOM})
    before, tensors = predict(model), tensors_of(model)
    model.set_graft(graft)
    with pytest.raises(StateError, match=f"took the graft out after step {step}"):
        dg.finetune(
            model,
            batches(),
            finetune_config(2, ema_decay=0.9),
            noise_scheduler=SCHEDULER,
            callbacks=[CallsVerb(getattr(model, verb), step=step)],
        )
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)
    assert not model.training


def test_an_enabled_graft_and_a_target_are_needed():
    model, graft = build({"self_attention[1]": RANDOM})
    with pytest.raises(StateError, match="no graft"):
        dg.finetune(model, batches(), finetune_config(), noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    model.disable_graft()
    with pytest.raises(StateError, match="enable_graft"):
        dg.finetune(model, batches(), finetune_config(), noise_scheduler=SCHEDULER)
    model.enable_graft()
    from diffusers_graft.inspection import example_inputs

    with pytest.raises(TrainingError, match="what to predict"):
        dg.finetune(model, [example_inputs(model)], finetune_config())


def test_a_target_of_another_shape_is_refused():
    (model, graft), batch = build({"self_attention[:]": "hyena_x"}), batches(1)[0]
    model.set_graft(graft)
    odd = {
        **{name: value for name, value in batch.items() if name != "sample"},
        "hidden_states": batch["sample"],
        "timestep": torch.zeros(len(batch["sample"]), dtype=torch.long),
        "target": batch["sample"][:, :, :1],
    }
    with pytest.raises(TrainingError, match="The model predicts"):
        dg.finetune(model, [odd], finetune_config())


def prepared_batch(size=8):
    """Model arguments with a target: nothing is drawn."""
    noised = Noising(scheduler=SCHEDULER, drop_labels=False)(
        tiny_dit(), batches(1, size=size)[0], torch.Generator().manual_seed(0)
    )
    return {**noised.inputs, "target": noised.target}


def test_accumulated_batches_are_one_larger_batch():
    whole = prepared_batch()
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 4), slice(4, 8))]
    results = []
    for data, accumulate in (([whole], 1), (halves, 2)):
        model = grafted_model()
        run_finetune(model, data, accumulate=accumulate, optimizer="SGD", lr=0.1, schedule="constant")
        results.append(weights_of(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_leaves_weights_in_float32_and_stays_close(precision):
    losses = {kind: run_finetune(grafted_model(), steps=8, precision=kind) for kind in ("no", precision)}
    assert losses[precision] != losses["no"]
    assert losses[precision] == pytest.approx(losses["no"], rel=0.05)
    model = grafted_model()
    run_finetune(model, precision=precision)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_removed_blocks_are_put_back_after_training():
    model = tiny_dit()
    before = tensors_of(model)
    model.set_graft("block[0]=remove")
    dg.finetune(model, batches(2), dg.FinetuneConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    model.unset_graft()
    assert same_tensors(model, before)


def test_gradient_checkpointing_of_block_pairs_gives_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_dit()
        model.set_graft("block_pair[:]=parallel")
        model.train() if checkpointed else None
        if checkpointed:
            model.enable_gradient_checkpointing()
            for module in model.modules():
                module.training = module is model
        from diffusers_graft.inspection import example_inputs

        model(**example_inputs(model)).sample.square().mean().backward()
        gradients.append(model.transformer_blocks[1].attn1.to_q.weight.grad)
    assert torch.allclose(*gradients)


@pytest.mark.parametrize(
    "settings",
    [
        {"distill_output": 1.0},
        {"distill_features": 0.5},
        {"distill_output": 1.0, "distill_features": 1.0, "train": "operators"},
        {"gradient_checkpointing": True, "distill_features": 0.5},
        {"compile": "eager"},
        {"precision": "bf16"},
        {"min_snr": 5.0},
        {"optimizer": "RAdam", "schedule": "cosine", "weight_decay": 0.1},
        {"accumulate": 2, "ema_decay": 0.9},
        {"train": "operators+lora"},
        {"train": "operators+lora", "lora": LoraConfig(r=2, target_modules=["to_q"]), "distill_output": 1.0},
    ],
    ids=str,
)
def test_every_setting_trains_and_leaves_no_trace(settings):
    model = grafted_model()
    start, checkpointed = predict(model), model.is_gradient_checkpointing
    model.disable_graft()
    before, tensors = predict(model), tensors_of(model)
    model.enable_graft()
    losses = run_finetune(model, **settings)
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert not torch.equal(predict(model), start)
    assert model.is_gradient_checkpointing == checkpointed
    assert not any(module._forward_hooks for module in model.modules())
    model.unset_graft()
    assert torch.equal(predict(model), before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_pixart_with_learned_sigma_and_features():
    from diffusers_graft.inspection import example_inputs

    model = grafted_model(tiny_pixart)
    conditions = example_inputs(model, batch_size=4)
    batch = {"sample": conditions.pop("hidden_states"), **{k: v for k, v in conditions.items() if k != "timestep"}}
    assert len(run_finetune(model, [batch], distill_features=1.0, distill_output=1.0, train="operators")) == 3


def test_checkpointed_gradients_are_the_same():
    results = []
    for checkpointing in (False, True):
        model = grafted_model()
        run_finetune(model, gradient_checkpointing=checkpointing, distill_features=1.0)
        results.append(predict(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_lora_of_rank_64_is_the_default_beside_operators():
    model = grafted_model()
    run_finetune(model, train="operators+lora")
    assert model.graft.adapter_config.r == 64
    assert len(model.graft.adapters) > 4
    row = model.graft.history[-1]
    assert row["lora"] == {"r": 64, "alpha": 64}


def test_the_compiled_model_is_the_one_that_runs(monkeypatch):
    backends, calls = [], []

    def compiled(model, **backend):
        backends.append(backend)
        return lambda *args, **kwargs: calls.append(1) or model(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiled)
    for choice in (True, "eager"):
        run_finetune(grafted_model(), compile=choice, steps=1)
    assert (backends, calls) == ([{}, {"backend": "eager"}], [1, 1])


def test_held_out_batches_choose_the_weights_and_touch_nothing(tmp_path):
    """A learning rate far too large makes everything after the start worse."""
    data, held_out = batches(2), batches(2, seed=9)
    settings = {"steps": 3, "lr": 0.3, "warmup": 0, "schedule": "constant"}
    losses = run_finetune(grafted_model(), data, **settings)
    model = grafted_model()
    start = predict(model)
    before = dg.evaluate(model, held_out, noise_scheduler=SCHEDULER)["denoising_loss"]
    chosen = run_finetune(
        model, data, held_out=held_out, evaluate_every=1, output_dir=tmp_path, log_every=1, **settings
    )
    assert chosen == losses
    assert torch.equal(predict(model), start)
    rows = read_metrics(tmp_path)
    assert [row["held_out"]["step"] for row in rows] == [1, 2, 3]
    row = model.graft.history[-1]
    assert row["best_step"] == 0
    assert row["held_out_loss"] < min(row["held_out"]["loss"] for row in rows)
    assert row["held_out_loss"] == pytest.approx(before, rel=0.2)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_weights_that_were_evaluated_are_the_result(ema_decay):
    held_out = batches(1, seed=9)
    model = grafted_model()
    settings = {"steps": 4, "lr": 1e-3, "warmup": 0, "ema_decay": ema_decay, "evaluate_every": 1}
    run_finetune(model, held_out=held_out, **settings)
    row = model.graft.history[-1]
    again = grafted_model()
    again.load_state_dict(model.state_dict())
    run_finetune(again, held_out=held_out, steps=1, lr=1e-12)
    assert again.graft.history[-1]["held_out_loss"] == pytest.approx(row["held_out_loss"], rel=1e-5)


def test_evaluation_resumes_bit_equal(tmp_path):
    def run(folder, **arguments):
        model = grafted_model()
        settings = {"steps": 6, "lr": 0.02, "warmup": 0, "save_every": 2, "evaluate_every": 2, "ema_decay": 0.5}
        run_finetune(model, held_out=batches(1, seed=9), output_dir=folder, **settings, **arguments)
        return model.state_dict(), model.graft.history[-1]["best_step"]

    expected, best_step = run(tmp_path / "through")
    with pytest.raises(StopError):
        run(tmp_path / "cut", callbacks=[StopAt(5)])
    tensors, again = run(tmp_path / "cut", resume=True)
    assert same(tensors, expected)
    assert again == best_step


def test_held_out_batches_that_are_not_finite_are_named():
    with pytest.raises(TrainingError, match="held-out loss at step 0 is nan"):
        run_finetune(grafted_model(), held_out=poisoned()[1:])
