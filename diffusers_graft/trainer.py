"""The two stages strung together, with something on disk after each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, SchedulerMixin

from .errors import StateError, TrainingError
from .evaluation.evaluate import Scores, evaluate
from .injection.graft import Graft, build_graft, get_graft, is_enabled
from .injection.install import disable, enable, install
from .planning.plan import GraftPlan, plan_graft
from .serialization.graft_folder import save_graft
from .serialization.upload import push_graft
from .training import distributed as processes
from .training.batches import Batch, make_batches
from .training.callbacks import RunState
from .training.distill.config import DistillConfig
from .training.distill.distill import SiteReport, distill
from .training.finetune.config import FinetuneConfig
from .training.finetune.finetune import finetune
from .training.fsdp import fsdp_plugin, shard
from .training.metrics_log import copy_metrics
from .training.session import has_checkpoint


@dataclass(frozen=True, kw_only=True)
class GraftTrainingArguments:
    """Settings of a `GraftTrainer`.

    Attributes:
        output_dir: after each stage the graft is saved there, whole; what stood there before is replaced, never half.
            Checkpoints, `training.jsonl` and the logs of trackers lie beside it.
        distill, finetune: settings of the stages; None leaves a stage out.
        per_device_train_batch_size: samples of a step on each process, where the dataset holds single samples.
        eval_batches: batches of the evaluation.
        dataloader_num_workers: processes that read the dataset.
        seed: of random starts and of the order of the data.
    """

    output_dir: str | Path
    distill: DistillConfig | None = field(default_factory=DistillConfig)
    finetune: FinetuneConfig | None = field(default_factory=FinetuneConfig)
    per_device_train_batch_size: int = 32
    eval_batches: int = 16
    dataloader_num_workers: int = 0
    seed: int = 0

    def __post_init__(self):
        if min(self.per_device_train_batch_size, self.eval_batches, self.dataloader_num_workers + 1) < 1:
            raise TrainingError(f"Batches have one sample or more, an evaluation one batch or more; got {self}.")


class GraftTrainer:
    """Graft a model and teach it, in the shape of `transformers.Trainer`.

    Args:
        model: a diffusers model, not grafted; moved to the device of its process, unless its weights are to be spread.
        plan: a `GraftPlan`, or rules.
        train_dataset, eval_dataset: map-style datasets of single samples (`{"sample": latents, **conditioning}`), or
            lists and other iterables of batches of them. By the error on the evaluation data, stage one chooses
            weights.
        noise_scheduler: of the model's pipeline.
        null_prompt: conditioning of no prompt; prompts are dropped where it is given.
        callbacks: objects with methods of `transformers.TrainerCallback`, see `diffusers_graft.training.session.Session`.
        args: settings.
    """

    def __init__(
        self,
        model: ModelMixin,
        plan: GraftPlan | Mapping[str, Any] | str,
        args: GraftTrainingArguments,
        *,
        train_dataset: Iterable,
        eval_dataset: Iterable | None = None,
        noise_scheduler: SchedulerMixin | None = None,
        null_prompt: Mapping[str, Any] | None = None,
        callbacks: Iterable[Any] = (),
    ):
        self.model, self.args, self.callbacks = model, args, list(callbacks)
        self.common = {"noise_scheduler": noise_scheduler, "null_prompt": null_prompt}
        if isinstance(eval_dataset, Iterator):  # that is read once, and looked at in stage one and by `evaluate`
            eval_dataset = list(itertools.islice(eval_dataset, args.eval_batches))
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        several = processes.process_state().num_processes > 1 or processes.process_state().device.type == "cuda"
        if several and fsdp_plugin() is None:
            model.to(processes.process_state().device)
        self.plan = plan if isinstance(plan, GraftPlan) else plan_graft(model, plan)
        self.graft: Graft = build_graft(model, self.plan, seed=args.seed)
        self.scores: dict[str, Scores] = {}

    def train(self, resume_from_checkpoint: bool | str | Path = False) -> None:
        """Stage one, then stage two.

        Args:
            resume_from_checkpoint: True goes on where an earlier call in this `output_dir` was stopped, whichever
                stage that was in; a path goes on from that checkpoint, or from the newest of another `output_dir`.
        """
        self.distill(resume_from_checkpoint=resume_from_checkpoint)
        self.finetune(resume_from_checkpoint=resume_from_checkpoint)

    def distill(self, resume_from_checkpoint: bool | str | Path = False) -> dict[str, SiteReport]:
        """Stage one; leaves the graft installed and saved."""
        reports = {}
        if resume_from_checkpoint and is_enabled(self.model):
            disable(self.model)  # a stage two that failed in this process
        if self.args.distill is not None:
            held_out = self._held_out() if self.eval_dataset is not None else None
            reports = distill(
                self.model,
                self.graft,
                self._batches(),
                self.args.distill,
                held_out=held_out,
                **self._resumable(resume_from_checkpoint),
                **self.common,
            )
        self._run_graft()
        if not (resume_from_checkpoint and has_checkpoint(self.args.output_dir, "two")):
            self.save_model()
        return reports

    def finetune(self, resume_from_checkpoint: bool | str | Path = False) -> list[float]:
        """Stage two, on the model as stage one left it; saved again."""
        self._run_graft()
        losses = []
        if self.args.finetune is not None:
            losses = finetune(
                self.model,
                self._batches(),
                self.args.finetune,
                held_out=self._held_out() if self.eval_dataset is not None else None,
                **self._resumable(resume_from_checkpoint),
                **self.common,
            )
        self.save_model()
        return losses

    def evaluate(self, name: str = "grafted") -> Scores:
        """Denoising loss on the evaluation data, kept under `name` for the card. Raises `StateError` without such
        data.
        """
        if self.eval_dataset is None:
            raise StateError("There is nothing to evaluate on: give the trainer an eval_dataset.")
        with shard(self.model, self.graft.sites) as model:
            self.scores[name] = evaluate(model, self._held_out(), noise_scheduler=self.common["noise_scheduler"])
        state = RunState("evaluation", 0)
        for callback in self.callbacks:
            if (method := getattr(callback, "on_evaluate", None)) is not None:
                method(self.args, state, state, metrics=dict(self.scores[name].values))
        return self.scores[name]

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the graft, by default to the `output_dir` of the arguments, else with the journal of the run; by one
        process.
        """
        if processes.is_main_process():
            if output_dir is not None:
                copy_metrics(self.args.output_dir, output_dir)
            save_graft(self.model, output_dir or self.args.output_dir, scores=self.scores)
        processes.wait_for_all()

    def push_to_hub(self, repo_id: str, **hub_arguments: Any) -> str:
        """Save, and push the graft with its card to the Hub; returns the address of the commit."""
        self.save_model()
        return push_graft(self.args.output_dir, repo_id, **hub_arguments)

    def _run_graft(self) -> None:
        if get_graft(self.model) is self.graft:
            enable(self.model)
        else:
            install(self.model, self.graft)

    def _resumable(self, resume: bool | str | Path) -> dict[str, Any]:
        return {"output_dir": self.args.output_dir, "resume": resume, "callbacks": self.callbacks}

    def _batches(self) -> Iterable[Batch]:
        size = self.args.per_device_train_batch_size * processes.process_state().num_processes
        return make_batches(self.train_dataset, size, self.args.seed, workers=self.args.dataloader_num_workers)

    def _held_out(self) -> list[Batch]:
        size = self.args.per_device_train_batch_size * processes.process_state().num_processes
        return list(itertools.islice(make_batches(self.eval_dataset, size, self.args.seed), self.args.eval_batches))
