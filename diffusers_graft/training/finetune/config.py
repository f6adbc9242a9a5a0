"""Settings of stage two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusers import ModelMixin

from ...core.sites import Sites
from ...errors import TrainingError
from ..config import TrainingConfig, require_one_of
from ..fsdp import find_blocks
from .lora import lora_settings
from .objective import VARIANCES
from .progression import ORDERS

if TYPE_CHECKING:
    from peft import LoraConfig

# Key of all parameters that no rule key names.
REST = "rest"

# Of blocks, as a multiple of the output's.
FEATURES_WEIGHT = 5.0

TRAINABLE = ("operators", "operators+lora", "all")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Settings of stage two, beside those of both stages (`diffusers_graft.training.config.TrainingConfig`).

    The ungrafted model is the teacher: the grafted one learns to give its answer and the outputs of its blocks, so
    that training does not move it away from what it was pretrained for. `denoising=1` trains on the data, too. The
    paper trains on the data alone, without a teacher: `denoising=1, distill_output=0`, learning rate 1e-4 after 1,000
    steps of warm-up. Without `lr`, the rate is 0.1 / width of the model. The defaults were chosen by the table in
    examples/ablation.

    Attributes:
        train: `"operators"` (the new parts), `"operators+lora"` (LoRA on the rest of the model beside them), or
            `"all"` weights of the model, as in the paper's class-conditional runs. None is `"operators+lora"` with
            `lora`, and `"all"` without.
        lora: settings of LoRA, whose layers are trained beside whatever else `train` names. None with
            `"operators+lora"` is rank and alpha 64 on every linear layer; the paper's text-to-image run has that rank.
        ema_decay: decay of an exponential moving average (diffusers' `EMAModel`), whose weights are the result; with 0
            the last weights are. `"auto"` averages over the last tenth of the run: 1 - 10 / steps, at most 0.9999.
        lr_scale: factors on the learning rate of sites by rule key, grafted or not, where later keys win; `"rest"` is
            everything else, such as `{"self_attention[1::2]": 3.0, "rest": 0.3}`.
        variance: of models that predict it: `"auto"`, `"vb"` or `"ignore"`, see
            `diffusers_graft.training.finetune.objective`.
        min_snr: gamma of min-SNR weighting, 5 is usual; None weights all noise levels alike.
        denoising: weight of the model's own objective. With 0, training batches need no target.
        timesteps: distribution of the noise's timesteps; None is `"uniform"` with `denoising=0`, and else `"auto"`.
        distill_output: weight of the distance to the ungrafted model's prediction; costs its forward at every step.
        distill_features: weight of the distance to the ungrafted model's block outputs, as a share of their size and
            with massive activations left out (arXiv 2412.01199, section 4.3); needs the same forward, and memory for
            the outputs of all blocks. None is five times `distill_output` where the sites lie in lists of blocks, and
            else 0.
        trajectory: train on states of the grafted model's own sampling, in place of noised data: so many steps lead
            from pure noise to a state, each at the cost of a forward (arXiv 2510.08318). Needs `denoising=0`. See
            `diffusers_graft.training.finetune.trajectory`.
        match_distribution: weight of the divergence of the states' distribution from the ungrafted model's, with a
            gradient through the last step of the trajectory (arXiv 2510.08318); needs one, and another forward.
        progressive, progressive_share: replace the sites one after another, spread evenly over this share of the
            steps, in `"forward"` order or beginning with the `"least_harm"`; the others run as the original does.
            None replaces all at once. See `diffusers_graft.training.finetune.progression`.
        progressive_patience: replace the next site earlier, once the mean loss of so many steps is no smaller than
            that of as many before them. None waits for its share of the steps.
        gradient_checkpointing: recompute blocks in the backward: less memory, a third more time.
        compile: compile the training forward, by a backend's name or True for torch's default.
    """

    came_later: ClassVar[Mapping[str, Any]] = {
        "lr_scale": {},
        "denoising": 1.0,
        "trajectory": 0,
        "match_distribution": 0.0,
        "progressive": None,
        "progressive_share": 0.5,
        "progressive_patience": None,
    }

    train: str | None = None
    lora: LoraConfig | None = None
    ema_decay: float | str = 0.0
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    variance: str = "auto"
    min_snr: float | None = None
    denoising: float = 0.0
    timesteps: str | None = None
    distill_output: float = 1.0
    distill_features: float | None = None
    trajectory: int = 0
    match_distribution: float = 0.0
    progressive: str | None = None
    progressive_share: float = 0.5
    progressive_patience: int | None = None
    gradient_checkpointing: bool = False
    compile: bool | str = False

    def __post_init__(self):
        super().__post_init__()
        # The class is frozen, so defaults that depend on other settings are set past it.
        if self.timesteps is None:
            object.__setattr__(self, "timesteps", "auto" if self.denoising else "uniform")
        if self.train is None:
            object.__setattr__(self, "train", "all" if self.lora is None else "operators+lora")
        require_one_of("set of weights to train", self.train, TRAINABLE)
        require_one_of("treatment of predicted variances", self.variance, VARIANCES)
        if self.train == "operators+lora" and self.lora is None:
            from peft import LoraConfig

            object.__setattr__(self, "lora", LoraConfig(r=64, lora_alpha=64, target_modules="all-linear"))
        if self.ema_decay != "auto" and not (isinstance(self.ema_decay, int | float) and 0 <= self.ema_decay < 1):
            raise TrainingError(f'A decay lies from 0 up to 1, or is "auto"; got {self.ema_decay!r}.')
        scales = self.lr_scale.values() if isinstance(self.lr_scale, Mapping) else [None]
        if not all(isinstance(scale, int | float) and scale >= 0 for scale in scales):
            raise TrainingError(
                f"Factors on the learning rate are numbers from zero by rule key; got {self.lr_scale!r}."
            )
        self._check_progressive()
        self._check_objective()

    def _check_progressive(self) -> None:
        if self.progressive is not None:
            require_one_of("order of replacement", self.progressive, ORDERS)
        if not 0 < self.progressive_share <= 1:
            raise TrainingError(f"A share of the steps lies above 0, up to 1; got {self.progressive_share}.")
        patience = self.progressive_patience
        if patience is not None and (type(patience) is not int or patience < 1):
            raise TrainingError(f"Patience is a number of steps from 1, or None; got {patience!r}.")
        if self.progressive is not None and self.compile:
            raise TrainingError("A model that changes as it trains cannot be compiled: set compile=False.")

    def _check_objective(self) -> None:
        if type(self.trajectory) is not int or self.trajectory < 0:
            raise TrainingError(f"The steps of a trajectory are a whole number from zero; got {self.trajectory!r}.")
        if self.trajectory and self.denoising:
            raise TrainingError(
                "States of the model's own sampling have no target but the ungrafted model's: set denoising=0."
            )
        if self.match_distribution and not self.trajectory:
            raise TrainingError(
                "match_distribution moves states of the model's own sampling: set trajectory to some steps, such as 4."
            )
        weights = (self.denoising, self.distill_output, self.distill_features or 0.0, self.match_distribution)
        if min(weights) < 0 or not any(weights):
            raise TrainingError(
                "The weights denoising, distill_output, distill_features and match_distribution are not negative, and "
                f"one of them is above zero; got {weights}."
            )

    def for_model(self, model: ModelMixin, sites: Sites) -> Self:
        """Return the settings with numbers where the model decides them: learning rate, and weight of features."""
        config = super().for_model(model, sites)
        if config.distill_features is not None:
            return config
        weight = FEATURES_WEIGHT * config.distill_output if find_blocks(model, sites) else 0.0
        return dataclasses.replace(config, distill_features=weight)

    @property
    def average_decay(self) -> float:
        """Decay of the moving average, as a number."""
        if isinstance(self.ema_decay, str):
            return min(0.9999, max(0.0, 1 - 10 / self.steps))
        return self.ema_decay

    @property
    def uses_teacher(self) -> bool:
        """Whether the ungrafted model runs at every step."""
        return bool(self.distill_output or self.distill_features or self.match_distribution)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, JSON-able; of LoRA, rank and alpha."""
        # peft's settings hold sets and enums, which JSON lacks.
        settings = TrainingConfig.to_dict(dataclasses.replace(self, lora=None))
        settings["lora"] = None
        if self.lora is not None:
            settings["lora"] = {"r": self.lora.r, "alpha": self.lora.lora_alpha}
        return settings

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the weights, all of LoRA's among them."""
        settings = super().identity()
        if self.lora is not None:
            settings["lora"] = lora_settings(self.lora)
        return settings


def resolve_annotations() -> None:
    """Import what annotations here name, for those who read them: peft takes longer to import than this package."""
    from peft import LoraConfig

    globals()["LoraConfig"] = LoraConfig
