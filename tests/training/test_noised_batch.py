"""Clean samples become noised inputs; what does not fit the model is refused."""

import pytest
import torch
from diffusers import UNet2DConditionModel

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.training import distributed
from diffusers_graft.training.batches import Shared
from diffusers_graft.training.noised_batch import NoisedBatch, Noising, drop_class_labels

from ..models import SCHEDULER, batches, same_tensors, tensors_of, tiny_dit, tiny_pixart
from .runs import (
    HYENA,
    run_distill,
)

SAMPLE, LABELS = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([SAMPLE, LABELS], "got list"),
        (None, "got NoneType"),
        ({"sample": SAMPLE.numpy(), "class_labels": LABELS}, "got ndarray"),
        ({"sample": SAMPLE, "class_labels": LABELS, "prompt": "a"}, "does not take prompt"),
        ({"sample": SAMPLE}, "needs class_labels"),
        ({"sample": SAMPLE, "class_labels": None}, "needs class_labels, a tensor"),
        ({"timestep": LABELS, "class_labels": LABELS}, "needs hidden_states"),
        ({"sample": SAMPLE, "class_labels": LABELS + 6}, "of 2 whole numbers below 6"),
        ({"sample": SAMPLE, "class_labels": LABELS[:1]}, "of 2 whole numbers"),
        ({"sample": SAMPLE, "class_labels": LABELS / 2}, "whole"),
        ({"sample": SAMPLE.long(), "class_labels": LABELS}, "clean ones in floating point"),
        ({"sample": SAMPLE[:0], "class_labels": LABELS[:0]}, "A batch holds samples"),
    ],
)
def test_batches_that_do_not_fit_the_model(batch, words, tmp_path):
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[2]": "hyena_x"}))
    before = tensors_of(model)
    with pytest.raises(TrainingError, match=words):
        dg.distill(model, graft, [batch], dg.DistillConfig(steps=1, progress=False), noise_scheduler=SCHEDULER)
    with pytest.raises(TrainingError, match=words):
        dg.distill(model, graft, batches(1), noise_scheduler=SCHEDULER, held_out=[batch], output_dir=tmp_path / "run")
    with pytest.raises(TrainingError, match=words):
        dg.closed_form(model, graft, [batch], noise_scheduler=SCHEDULER)
    with pytest.raises(TrainingError, match=words):
        dg.evaluate(model, [batch], noise_scheduler=SCHEDULER)
    assert same_tensors(model, before)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match=words):
        dg.finetune(
            model,
            [batch],
            dg.FinetuneConfig(steps=1, progress=False),
            noise_scheduler=SCHEDULER,
            output_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()  # neither begun nor are checkpoints of another run dropped


def test_a_null_prompt_takes_the_place_of_what_is_there():
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[2]": "hyena_x"}))
    for null, words in (
        ({"prompt": SAMPLE}, "prompt of a batch is a tensor"),
        ({"class_labels": 3}, "dict of tensors"),
        ([1], "dict of tensors"),
    ):
        with pytest.raises(TrainingError, match=words):
            dg.distill(
                model,
                graft,
                batches(),
                dg.DistillConfig(steps=1, progress=False),
                noise_scheduler=SCHEDULER,
                null_prompt=null,
            )


def test_both_stages_of_a_unet_which_calls_its_noised_input_sample():
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    sample, prompt, generator = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.Generator()
    clean = {"sample": sample, "encoder_hidden_states": prompt}
    complete = {**clean, "timestep": torch.tensor([3, 4]), "target": sample}
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[0]": "hyena_x"}))
    dg.distill(model, graft, [clean, complete], dg.DistillConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    dg.finetune(model, [clean, complete], dg.FinetuneConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    noising = Noising(scheduler=SCHEDULER)
    assert torch.equal(noising(model, complete, generator).noisy, sample)
    assert not torch.equal(noising(model, clean, generator).noisy, sample)


def test_labels_are_dropped_for_a_sample_in_all_blocks_at_the_models_rate():
    labels = drop_class_labels(tiny_dit(), torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == {0, 5}
    assert (labels == 5).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_prompts_are_dropped_where_there_is_a_null_prompt():
    from diffusers_graft.inspection import example_inputs
    from diffusers_graft.training.noised_batch import Noising

    model = tiny_pixart()
    conditions = example_inputs(model, batch_size=400)
    batch = {
        "sample": conditions["hidden_states"],
        "encoder_hidden_states": conditions["encoder_hidden_states"],
        "encoder_attention_mask": conditions["encoder_attention_mask"],
    }
    null = {"encoder_hidden_states": torch.full((1, 12, 10), 7.0), "encoder_attention_mask": torch.zeros(1, 12)}
    noising = Noising(scheduler=SCHEDULER, null_prompt=null, prompt_dropout=0.25)
    inputs = noising(model, batch, torch.Generator().manual_seed(0)).inputs
    dropped = (inputs["encoder_hidden_states"] == 7).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(inputs["encoder_attention_mask"].any(1), ~dropped)
    with pytest.raises(TrainingError, match="same length"):
        Noising(scheduler=SCHEDULER, null_prompt={"encoder_hidden_states": torch.zeros(1, 3, 10)})(
            model, batch, torch.Generator()
        )
    wrong = {"sample": batch["sample"][:4]} | {k: v[:4] for k, v in batch.items() if k != "sample"}
    wrong["added_cond_kwargs"] = conditions["added_cond_kwargs"]
    run_distill({"self_attention[1]": HYENA}, model, [wrong], null_prompt=null)


def test_noise_is_drawn_anew_at_every_step():
    model, seen = tiny_dit(), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    data = [{"sample": torch.zeros(8, 1, 8, 8), "class_labels": torch.zeros(8, dtype=torch.long)}]
    run_distill({"self_attention[0]": HYENA}, model, data, steps=12)
    for name in ("hidden_states", "timestep"):
        rows = torch.stack([inputs[name].flatten() for inputs in seen]).double()
        assert len(rows.unique(dim=0)) == 12
    labels = torch.cat([inputs["class_labels"] for inputs in seen])
    assert set(labels.tolist()) == {0, 5}  # 5 is no label


def test_a_process_takes_its_samples_and_all_of_what_is_shared(monkeypatch):
    class Second:
        num_processes, process_index = 2, 1

    monkeypatch.setattr(distributed, "process_state", Second)
    rows = torch.arange(4.0)
    inputs = {
        "hidden_states": rows,
        "img_ids": rows,
        "img_shapes": ["a", "b", "c", "d"],
        "layers": [rows, -rows, rows],
        "num_frames": 4,
    }
    share = NoisedBatch(inputs, rows, shared=frozenset({"img_ids"})).local_share()
    assert share.inputs["hidden_states"].tolist() == share.target.tolist() == [2, 3]
    assert share.inputs["img_ids"].tolist() == [0, 1, 2, 3]
    assert share.inputs["img_shapes"] == ["c", "d"]
    assert [layer.tolist() for layer in share.inputs["layers"]] == [[2, 3], [-2, -3], [2, 3]]
    assert share.inputs["num_frames"] == 4
    assert share.sample is None
    with pytest.raises(TrainingError, match="3 samples cannot be divided evenly among 2"):
        NoisedBatch({"hidden_states": rows[:3]}, None).local_share()


def test_what_is_shared_reaches_the_model_as_it_is():
    model = tiny_dit()
    batch = {**batches(1)[0], "cross_attention_kwargs": Shared({"scale": 2})}
    noised = Noising(scheduler=SCHEDULER)(model, batch, torch.Generator().manual_seed(0))
    assert noised.inputs["cross_attention_kwargs"] == {"scale": 2}
    assert noised.shared == {"cross_attention_kwargs"}
