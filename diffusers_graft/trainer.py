"""The two stages one after the other, in the shape of `transformers.Trainer`, with the graft on disk after each."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import ModelMixin, SchedulerMixin

from .background_push import BackgroundPush
from .data.collation import BatchMaker, holds_pictures
from .data.encoding import SampleEncoder, default_size
from .data.recording import find_denoiser
from .errors import GraftError, StateError, TrainingError
from .evaluation.evaluate import evaluate
from .evaluation.scores import Scores, select_comparable
from .injection.graft import Graft, build_graft, get_graft, is_enabled
from .injection.install import disable, enable, install
from .planning.plan import GraftPlan, plan_graft
from .reporting.report import try_report
from .samples import SampleConfig, Samples
from .serialization.graft_folder import save_graft
from .serialization.upload import push_graft
from .training import distributed as processes
from .training.argument_names import require_known_settings
from .training.batches import Batch, Collate, Share
from .training.callbacks import CallbackArguments, Callbacks, RunState, make_callback
from .training.config import TrainingConfig, require_one_of
from .training.distill.config import DistillConfig
from .training.distill.distill import SiteReport, distill
from .training.finetune.config import FinetuneConfig
from .training.finetune.finetune import finetune
from .training.fsdp import fsdp_plugin, shard
from .training.metrics_log import copy_metrics
from .training.previews import Preview
from .training.session import has_checkpoint, log_scores

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

HUB_STRATEGIES = ("stage", "end", "every_save")


@dataclass(frozen=True, kw_only=True)
class GraftTrainingArguments:
    """Settings of a `GraftTrainer`.

    Attributes:
        output_dir: after each stage the graft is saved there, all files or none; checkpoints, `training.jsonl`, the
            logs of trackers and `report.html` lie beside it.
        distill, finetune: settings of the stages; None leaves a stage out.
        per_device_train_batch_size: samples of a step on each process, where the dataset holds single samples.
        per_device_eval_batch_size: the same of the evaluation; None is that of the training.
        eval_batches: batches of the evaluation.
        dataloader_num_workers: processes that read the dataset.
        remove_unused_columns: drop columns that the model does not take, with a warning.
        seed: of random starts and of the order of the data.
        save_steps, save_total_limit, logging_steps, eval_steps, gradient_accumulation_steps, report_to, disable_tqdm,
            bf16, fp16: as in `transformers.TrainingArguments`, for both stages; None leaves what each stage says.
        push_to_hub, hub_model_id, hub_private_repo: push the graft, to this repository.
        hub_strategy: when to push: `"stage"` after each stage, `"end"` after the last one, `"every_save"` after each
            stage and in the background after every checkpoint.
        resolution: height and width in pixels to which the trainer's pipeline encodes pictures; None is that of the
            model.
        samples: pictures drawn by the trainer's pipeline while it trains.

    Raises `TrainingError` for counts below one, and for settings of `transformers.TrainingArguments` that are set
    elsewhere (the message says where); and `UnknownNameError` for unknown settings.
    """

    output_dir: str | Path
    distill: DistillConfig | None = field(default_factory=DistillConfig)
    finetune: FinetuneConfig | None = field(default_factory=FinetuneConfig)
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int | None = None
    eval_batches: int = 16
    dataloader_num_workers: int = 0
    remove_unused_columns: bool = True
    seed: int = 0
    save_steps: int | None = None
    save_total_limit: int | None = None
    logging_steps: int | None = None
    eval_steps: int | None = None
    gradient_accumulation_steps: int | None = None
    report_to: str | Iterable[str] | None = None
    disable_tqdm: bool | None = None
    bf16: bool | None = None
    fp16: bool | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_strategy: str = "stage"
    resolution: int | tuple[int, int] | None = None
    samples: SampleConfig | None = None

    def __new__(cls, *args: Any, **settings: Any):
        require_known_settings(cls, settings)
        return super().__new__(cls)

    def __post_init__(self):
        sizes = [self.per_device_train_batch_size, self.eval_batches, self.dataloader_num_workers + 1]
        if self.per_device_eval_batch_size is not None:
            sizes.append(self.per_device_eval_batch_size)
        if min(sizes) < 1:
            raise TrainingError(f"Batches have one sample or more, an evaluation one batch or more; got {self}.")
        if self.push_to_hub and not self.hub_model_id:
            raise TrainingError('push_to_hub=True needs a repository: give hub_model_id="user/name".')
        require_one_of("hub_strategy", self.hub_strategy, HUB_STRATEGIES)
        overrides = self._stage_overrides()
        # The arguments are frozen, as all settings are; this is still their making.
        for name in ("distill", "finetune"):
            config = getattr(self, name)
            if config is not None and overrides:
                object.__setattr__(self, name, dataclasses.replace(config, **overrides))

    def _stage_overrides(self) -> dict[str, Any]:
        """Return settings of both stages, under the stages' names."""
        overrides: dict[str, Any] = {
            "save_every": self.save_steps,
            "keep": self.save_total_limit,
            "log_every": self.logging_steps,
            "evaluate_every": self.eval_steps,
            "accumulate": self.gradient_accumulation_steps,
        }
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if self.bf16 and self.fp16:
            raise TrainingError("Training is in bf16 or in fp16, not in both.")
        if self.bf16:
            overrides["precision"] = "bf16"
        if self.fp16:
            overrides["precision"] = "fp16"
        if self.disable_tqdm is not None:
            overrides["progress"] = not self.disable_tqdm
        if self.report_to is not None and self.report_to != "all":
            names = {self.report_to} if isinstance(self.report_to, str) else set(self.report_to)
            overrides["trackers"] = tuple(sorted(names - {"none"}))
        return overrides


class GraftTrainer:
    """Trainer of a graft: both stages, evaluation, saving and sharing, in the shape of `transformers.Trainer`.

    Args:
        model: a diffusers model, not grafted. It is moved to the device of its process, unless its weights will be
            sharded.
        plan: a `GraftPlan`, or rules.
        args: settings.
        train_dataset, eval_dataset: single samples (`{"sample": latents, **conditioning}`) in a map-style dataset, a
            list or any iterable, or batches of them in a list or any iterable. With evaluation data, the weights that
            are best on them are the result of a stage.
        noise_scheduler: of the model's pipeline.
        null_prompt: conditioning of the empty prompt. If given, it takes the place of prompts at the rate
            `prompt_dropout` of the stage.
        callbacks: of transformers, or objects with some of their methods; see
            `diffusers_graft.training.callbacks.Callbacks`.
        data_collator: makes a batch of a list of single samples; `dg.data.SampleEncoder(pipe, size=...)` encodes
            pictures and captions.
        pipeline: of the model; encodes pictures and captions where there is no `data_collator`, and draws samples.
        previews: see `diffusers_graft.training.previews.Preview`; `dg.Samples` among them.

    Raises `TrainingError` for a pipeline of another model, and for samples without a pipeline.
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
        data_collator: Collate | None = None,
        pipeline: DiffusionPipeline | None = None,
        previews: Iterable[Preview] = (),
    ):
        if pipeline is not None and find_denoiser(pipeline) is not model:
            raise TrainingError(
                "The pipeline has another model than the one to train: give pipe.transformer as model."
            )
        self.model = model
        self.args = args
        self.callbacks = [make_callback(callback) for callback in callbacks]
        self.noise_scheduler = noise_scheduler
        self.null_prompt = null_prompt
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.scores: dict[str, Scores] = {}
        self.previews = [*previews, *self._make_samples(pipeline)]
        self._background_push: BackgroundPush | None = None
        if args.push_to_hub and args.hub_model_id and args.hub_strategy == "every_save":
            self._background_push = BackgroundPush(args.output_dir, args.hub_model_id, private=args.hub_private_repo)
            self.previews.append(self._background_push)
            self.callbacks.append(self._background_push)
        if data_collator is None and pipeline is not None and holds_pictures(train_dataset):
            data_collator = SampleEncoder(pipeline, size=args.resolution or default_size(pipeline))
        self._batch_maker = BatchMaker(
            model,
            seed=args.seed,
            workers=args.dataloader_num_workers,
            collate=data_collator,
            drop_columns=args.remove_unused_columns,
        )
        if isinstance(eval_dataset, Iterator):
            # It can be read once, and is needed in both stages and by `evaluate`.
            self.eval_dataset = self._read_held_out()
        state = processes.process_state()
        # Sharded weights are moved shard by shard, by the stage that trains them.
        device: Any = state.device
        if (state.num_processes > 1 or device.type == "cuda") and fsdp_plugin() is None:
            model.to(device)
        if not isinstance(plan, GraftPlan):
            plan = plan_graft(model, plan)
        self.plan = plan
        self.graft: Graft = build_graft(model, self.plan, seed=args.seed)

    def train(self, resume_from_checkpoint: bool | str | Path = False) -> None:
        """Run stage one, then stage two.

        Args:
            resume_from_checkpoint: True to go on where an earlier call was stopped, in whichever stage that was; or
                the path of a checkpoint, or of the output folder of another run.

        Raises `FileError` for a path where no checkpoint is, and `StateError` for a checkpoint of another run.
        """
        self.distill(resume_from_checkpoint=resume_from_checkpoint)
        self.finetune(resume_from_checkpoint=resume_from_checkpoint)

    def distill(self, resume_from_checkpoint: bool | str | Path = False) -> dict[str, SiteReport]:
        """Run stage one; the graft is installed and saved afterwards. Returns the report of each site."""
        reports = {}
        # After a stage two that failed in this process, the graft is still in the model that stage one watches.
        if resume_from_checkpoint and is_enabled(self.model):
            disable(self.model)
        if self.args.distill is not None:
            reports = distill(
                self.model,
                self.graft,
                self._make_train_batches(),
                self.args.distill,
                **self._common_arguments(resume_from_checkpoint),
            )
        self._install_graft()
        # Where stage two had begun, its graft is in the folder, which is worth more than that of stage one.
        if not (resume_from_checkpoint and has_checkpoint(self.args.output_dir, "two")):
            self._save_and_push(is_last=self.args.finetune is None)
        return reports

    def finetune(self, resume_from_checkpoint: bool | str | Path = False) -> list[float]:
        """Run stage two on the model as stage one left it, and save the graft. Returns the loss of each step."""
        self._install_graft()
        losses = []
        if self.args.finetune is not None:
            losses = finetune(
                self.model,
                self._make_train_batches(),
                self.args.finetune,
                **self._common_arguments(resume_from_checkpoint),
            )
        self._save_and_push(is_last=True)
        self._write_report()
        return losses

    def evaluate(self, name: str = "grafted") -> Scores:
        """Measure the denoising loss on the evaluation data, stored under `name` for the card.

        Raises `StateError` without such data.
        """
        if self.eval_dataset is None:
            raise StateError("There is nothing to evaluate on: give the trainer an eval_dataset.")
        with shard(self.model, self.graft.sites) as model:
            self.scores[name] = evaluate(model, self._read_held_out(), noise_scheduler=self.noise_scheduler)
        # Callbacks read settings of a stage, and this evaluation belongs to none.
        config = self.args.finetune or self.args.distill or TrainingConfig()
        arguments = CallbackArguments(config, str(self.args.output_dir), has_evaluation=True)
        callbacks = Callbacks(self.callbacks, arguments, RunState("evaluation", config.steps), model=self.model)
        callbacks.call("on_evaluate", metrics=dict(self.scores[name].values))
        if processes.is_main_process():
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.scores[name].save(Path(self.args.output_dir) / "scores.json", name)
            log_scores(config, Path(self.args.output_dir), name, self.scores[name].values)
        self._write_report()
        return self.scores[name]

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the graft, by default to the `output_dir` of the arguments, else with a copy of `training.jsonl`.

        One process writes. Raises `FileError` where that fails.
        """
        if processes.is_main_process():
            if output_dir is not None:
                copy_metrics(self.args.output_dir, output_dir)
            # A trained graft is saved whatever its scores are: a resumed run may have some of an older library.
            save_graft(self.model, output_dir or self.args.output_dir, scores=select_comparable(self.scores))
        processes.wait_for_all()

    def push_to_hub(self, repo_id: str | None = None, **hub_arguments: Any) -> str | None:
        """Save the graft and push it with its card to the Hub.

        Args:
            repo_id: `hub_model_id` of the arguments unless given.
            hub_arguments: see `diffusers_graft.serialization.upload.push_graft`.

        Returns the address of the commit; None on all processes but the first. Raises `FileError` where the Hub
        refuses, and `StateError` without a repository.
        """
        repo_id = repo_id or self.args.hub_model_id
        if repo_id is None:
            raise StateError('There is no repository to push to: give push_to_hub("user/name"), or hub_model_id.')
        self.save_model()
        if not processes.is_main_process():
            return None
        return self._push(repo_id, hub_arguments)

    def _push(self, repo_id: str, hub_arguments: dict[str, Any]) -> str:
        if self.args.hub_private_repo is not None:
            hub_arguments.setdefault("private", self.args.hub_private_repo)
        return push_graft(self.args.output_dir, repo_id, **hub_arguments)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or an instance of a class of callbacks."""
        self.callbacks.append(make_callback(callback))

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first of a class, and return it; None where there is none."""
        for one in self.callbacks:
            if one is callback or (isinstance(callback, type) and isinstance(one, callback)):
                self.callbacks.remove(one)
                return one
        return None

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first of a class, where there is one."""
        self.pop_callback(callback)

    def _install_graft(self) -> None:
        if get_graft(self.model) is self.graft:
            enable(self.model)
        else:
            install(self.model, self.graft)

    def _make_samples(self, pipeline: DiffusionPipeline | None) -> list[Preview]:
        if self.args.samples is None:
            return []
        if pipeline is None:
            raise TrainingError("Samples are drawn by the model's pipeline: give the trainer pipeline=pipe.")
        return [Samples(pipeline, self.args.samples, self.args.output_dir)]

    def _save_and_push(self, *, is_last: bool) -> None:
        self.save_model()
        if self._background_push is not None:
            # The newer push is to be the last commit.
            self._background_push.wait()
        repo_id = self.args.hub_model_id
        is_wanted = self.args.push_to_hub and (is_last or self.args.hub_strategy != "end")
        if is_wanted and repo_id and processes.is_main_process():
            try:
                self._push(repo_id, {})
            except GraftError as error:
                # Hours of training are not lost for a network that is down.
                logger.warning("The graft is saved in %s and was not pushed: %s", self.args.output_dir, error)

    def _write_report(self) -> None:
        if processes.is_main_process():
            try_report(self.args.output_dir)

    def _common_arguments(self, resume: bool | str | Path) -> dict[str, Any]:
        """Return the arguments that both stages take."""
        held_out = None
        if self.eval_dataset is not None:
            held_out = self._read_held_out()
        return {
            "held_out": held_out,
            "noise_scheduler": self.noise_scheduler,
            "null_prompt": self.null_prompt,
            "output_dir": self.args.output_dir,
            "resume": resume,
            "callbacks": self.callbacks,
            "previews": self.previews,
        }

    def _read_held_out(self) -> list[Batch]:
        size = self.args.per_device_eval_batch_size or self.args.per_device_train_batch_size
        count = processes.process_state().num_processes
        batches = self._batch_maker.make_batches(self.eval_dataset, size * count, is_endless=False)
        chosen = itertools.islice(batches, self.args.eval_batches)
        # Evaluations are few and their batches are read over and over, so each process has all of them.
        return [processes.join_shares(batch) if isinstance(batch, Share) else batch for batch in chosen]

    def _make_train_batches(self) -> Iterable[Batch]:
        size = self.args.per_device_train_batch_size * processes.process_state().num_processes
        return self._batch_maker.make_batches(self.train_dataset, size)
