"""Settings under other names are refused with the place where the same is set."""

import dataclasses

import pytest
from transformers import TrainingArguments

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError

# Technical settings of transformers that people seldom write: the error lists what there is.
RARE = {
    "auto_find_batch_size",
    "batch_eval_metrics",
    "enable_jit_checkpoint",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
    "include_for_metrics",
    "logging_nan_inf_filter",
    "optim_target_modules",
    "restore_callback_states_from_checkpoint",
    "train_sampling_strategy",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
    "debug",
}
RARE_PREFIXES = ("log_", "save_on_", "eval_", "dataloader_")


def test_every_usual_name_of_transformers_is_accepted_or_named(tmp_path):
    ours = {one.name for one in dataclasses.fields(dg.GraftTrainingArguments)}
    for one in dataclasses.fields(TrainingArguments):
        if one.name in ours | RARE or one.name.startswith(RARE_PREFIXES):
            continue
        with pytest.raises(TrainingError, match=f"has no {one.name}(: |, which)"):
            dg.GraftTrainingArguments(output_dir=tmp_path, **{one.name: 1})


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
