"""Settings under other names are refused with the place where the same is set."""

import pytest

import diffusers_graft as dg


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (dg.GraftTrainingArguments, {"learning_rate": 1e-4}, "set lr of DistillConfig and FinetuneConfig"),
        (dg.GraftTrainingArguments, {"num_train_epochs": 3}, "stages count steps"),
        (dg.GraftTrainingArguments, {"fsdp": "full_shard"}, "accelerate launch --use_fsdp"),
        (dg.GraftTrainingArguments, {"eval_batch": 3}, "Did you mean 'eval_batches'"),
        (dg.GraftTrainingArguments, {"bf16": True, "fp16": True}, "not in both"),
        (dg.GraftTrainingArguments, {"push_to_hub": True}, "hub_model_id"),
        (dg.FinetuneConfig, {"save_total_limit": 3}, "has no save_total_limit, which is called keep here"),
        (dg.DistillConfig, {"max_steps": 3}, "has no max_steps, which is called steps here"),
        (dg.DistillConfig, {"step": 3}, "Did you mean 'steps'"),
    ],
)
def test_settings_that_belong_elsewhere_are_named(make, settings, words, tmp_path):
    place = {"output_dir": tmp_path} if make is dg.GraftTrainingArguments else {}
    with pytest.raises(dg.GraftError, match=words):
        make(**place, **settings)
