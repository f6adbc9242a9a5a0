"""The two stages strung together, with something on disk after each."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, SchedulerMixin

from ..errors import StateError
from ..evaluation.scores import Scores, evaluate
from ..graft import Graft, build_graft, is_enabled
from ..hub.push import push_graft
from ..hub.store import save_graft
from ..plan import GraftPlan, plan_graft
from ..surgery import install
from .data import batches_of
from .distill import DistillConfig, SiteReport, distill
from .finetune import FinetuneConfig, finetune


@dataclass(frozen=True, kw_only=True)
class GraftTrainingArguments:
    """Settings of a `GraftTrainer`.

    Attributes:
        output_dir: after each stage the graft is saved there, whole; what stood there before is replaced, never half.
        distill, finetune: settings of the stages; None leaves a stage out.
        per_device_train_batch_size: samples of a step, where the dataset holds single samples.
        eval_batches: batches of the evaluation.
        seed: of random starts and of the order of the data.
    """

    output_dir: str | Path
    distill: DistillConfig | None = field(default_factory=DistillConfig)
    finetune: FinetuneConfig | None = field(default_factory=FinetuneConfig)
    per_device_train_batch_size: int = 32
    eval_batches: int = 16
    seed: int = 0


class GraftTrainer:
    """Graft a model and teach it, in the shape of `transformers.Trainer`.

    Args:
        model: a diffusers model, not grafted.
        plan: a `GraftPlan`, or rules.
        train_dataset, eval_dataset: map-style datasets of single samples (`{"sample": latents, **conditioning}`), or lists
            and other iterables of batches of them.
        noise_scheduler: of the model's pipeline.
        args: settings.
    """

    def __init__(
        self, model: ModelMixin, plan: GraftPlan | dict[str, Any] | str, *, args: GraftTrainingArguments,
        train_dataset: Iterable, eval_dataset: Iterable | None = None, noise_scheduler: SchedulerMixin | None = None,
    ):  # fmt: skip
        self.model, self.args, self.noise_scheduler = model, args, noise_scheduler
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.plan = plan if isinstance(plan, GraftPlan) else plan_graft(model, plan)
        self.graft: Graft = build_graft(model, self.plan, seed=args.seed)
        self.scores: dict[str, Scores] = {}

    def train(self) -> None:
        """Stage one, then stage two."""
        self.distill()
        self.finetune()

    def distill(self) -> dict[str, SiteReport]:
        """Stage one; leaves the graft installed and saved."""
        reports = {}
        if self.args.distill is not None:
            reports = distill(self.model, self.graft, self._batches(), self.args.distill, noise_scheduler=self.noise_scheduler)
        install(self.model, self.graft)
        self.save_model()
        return reports

    def finetune(self) -> list[float]:
        """Stage two, on the model as stage one left it; saved again."""
        if not is_enabled(self.model):
            install(self.model, self.graft)
        losses = []
        if self.args.finetune is not None:
            losses = finetune(self.model, self._batches(), self.args.finetune, noise_scheduler=self.noise_scheduler)
        self.save_model()
        return losses

    def evaluate(self, name: str = "grafted") -> Scores:
        """Denoising loss on the evaluation data, kept under `name` for the card. Raises `StateError` without such data."""
        if self.eval_dataset is None:
            raise StateError("There is nothing to evaluate on: give the trainer an eval_dataset.")
        batches = batches_of(self.eval_dataset, self.args.per_device_train_batch_size, self.args.seed)
        some = [batch for batch, _ in zip(batches, range(self.args.eval_batches), strict=False)]
        self.scores[name] = evaluate(self.model, some, noise_scheduler=self.noise_scheduler)
        return self.scores[name]

    def save_model(self, folder: str | Path | None = None) -> None:
        """Save the graft, by default to `output_dir`."""
        save_graft(self.model, folder or self.args.output_dir, scores=self.scores)

    def push_to_hub(self, repo_id: str, **hub_arguments: Any) -> str:
        """Save, and push the graft with its card to the Hub; returns the address of the commit."""
        self.save_model()
        return push_graft(self.args.output_dir, repo_id, **hub_arguments)

    def _batches(self):
        return batches_of(self.train_dataset, self.args.per_device_train_batch_size, self.args.seed)
