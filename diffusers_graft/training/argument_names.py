"""Names of `transformers.TrainingArguments`, and where the same is set here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ..errors import TrainingError, UnknownNameError

# The setting of a stage that says the same.
SETTING_OF_ARGUMENT = {
    "max_steps": "steps",
    "learning_rate": "lr",
    "warmup_steps": "warmup",
    "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "schedule_args",
    "optim": "optimizer",
    "optim_args": "optimizer_args",
    "gradient_accumulation_steps": "accumulate",
    "logging_steps": "log_every",
    "eval_steps": "evaluate_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "report_to": "trackers",
}

_BOTH_STAGES = "DistillConfig and FinetuneConfig"
_ADVICE = {
    **{name: f"set {setting} of {_BOTH_STAGES}, each for its stage" for name, setting in SETTING_OF_ARGUMENT.items()},
    "weight_decay": f"set weight_decay of {_BOTH_STAGES}, each for its stage",
    "max_grad_norm": f"set max_grad_norm of {_BOTH_STAGES}, each for its stage",
    "adam_beta1": "set optimizer_args={'betas': (..., ...)} of a stage",
    "adam_beta2": "set optimizer_args={'betas': (..., ...)} of a stage",
    "adam_epsilon": "set optimizer_args={'eps': ...} of a stage",
    "num_train_epochs": f"stages count steps: set steps of {_BOTH_STAGES}",
    "gradient_checkpointing": "set gradient_checkpointing of FinetuneConfig; stage one holds one site at a time",
    "torch_compile": "set compile of FinetuneConfig",
    "torch_compile_backend": "set compile of FinetuneConfig",
    "load_best_model_at_end": "the best weights are the result wherever there is an eval_dataset",
    "metric_for_best_model": "weights are chosen by the evaluation loss",
    "greater_is_better": "weights are chosen by the evaluation loss",
    "eval_strategy": "give an eval_dataset, and eval_steps",
    "save_strategy": "set save_steps",
    "logging_strategy": "set logging_steps",
    "logging_dir": "logs of trackers lie in output_dir/logs",
    "overwrite_output_dir": "an earlier run is moved aside; resume with train(resume_from_checkpoint=True)",
    "resume_from_checkpoint": "pass it to train()",
    "data_seed": "seed also orders the data",
    "fsdp": "launch with accelerate launch --use_fsdp --fsdp_version 2",
    "fsdp_config": "launch with accelerate launch --use_fsdp --fsdp_version 2",
    "deepspeed": "launch with accelerate launch --use_fsdp --fsdp_version 2, which does the same",
    "hub_revision": "pass revision to push_to_hub",
    "full_determinism": "runs are deterministic as far as the device is",
    "eval_on_start": "every stage evaluates before its first step",
    "eval_delay": "every stage evaluates before its first step",
    "logging_first_step": "set logging_steps=1",
    "bf16_full_eval": "set bf16, in which evaluations compute too",
    "fp16_full_eval": "set fp16, in which evaluations compute too",
    "tf32": 'call torch.set_float32_matmul_precision("high")',
    "activation_checkpointing": "set gradient_checkpointing of FinetuneConfig; stage one holds one site at a time",
    "torch_compile_mode": "set compile of FinetuneConfig",
    "save_only_model": "the graft alone is saved after each stage; checkpoints go on exactly, so they hold all",
    "ignore_data_skip": "a resumed run goes on with the data where it was",
    "run_name": "trackers name a run by its stage",
    "dataloader_drop_last": "all batches are of one size: what is left over at the end of the data is dropped",
    "do_train": "call train()",
    "do_eval": "call evaluate()",
    "do_predict": "call the model's pipeline",
    "use_cpu": "launch with accelerate launch --cpu",
    "hub_always_push": 'hub_strategy="every_save" pushes after every checkpoint, unless a push is under way',
    **dict.fromkeys(
        (
            "accelerator_config",
            "parallelism_config",
            "ddp_backend",
            "ddp_broadcast_buffers",
            "ddp_bucket_cap_mb",
            "ddp_find_unused_parameters",
            "ddp_static_graph",
            "ddp_timeout",
            "local_rank",
        ),
        "launch with accelerate launch; gradients are averaged in one message",
    ),
    **dict.fromkeys(
        (
            "average_tokens_across_devices",
            "include_num_input_tokens_seen",
            "label_names",
            "label_smoothing_factor",
            "length_column_name",
            "liger_kernel_config",
            "neftune_noise_alpha",
            "prediction_loss_only",
            "use_cache",
            "use_liger_kernel",
        ),
        "it is of language models",
    ),
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "project"),
        "trackers are accelerate's, and read their own environment variables",
    ),
    "hub_token": "log in with `hf auth login`, or pass token to push_to_hub",
}


def require_known_settings(cls: type, names: Iterable[str]) -> None:
    """Raise an error for names that are no settings of a dataclass, and say where the same is set.

    Raises:
        TrainingError: a name of `transformers.TrainingArguments`.
        UnknownNameError: another one.
    """
    known = [one.name for one in dataclasses.fields(cls)]
    for name in names:
        if name in known:
            continue
        if SETTING_OF_ARGUMENT.get(name) in known:
            raise TrainingError(f"{cls.__name__} has no {name}, which is called {SETTING_OF_ARGUMENT[name]} here.")
        if name in _ADVICE:
            # Names of transformers are no mistakes in writing, so none is suggested for them.
            raise TrainingError(f"{cls.__name__} has no {name}: {_ADVICE[name]}.")
        raise UnknownNameError(f"setting of {cls.__name__}", name, known)
