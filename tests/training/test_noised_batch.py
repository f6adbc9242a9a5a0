"""Clean samples become noised inputs; what does not fit the model is refused."""

import pytest
import torch
from diffusers import UNet2DConditionModel

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.training.noised_batch import Noising

from ..models import SCHEDULER, batches, same_tensors, tensors_of, tiny_dit

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
