"""Settings of stage one, and of the closed-form start before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import TrainingError
from ..config import TrainingConfig, require_one_of
from .losses import LOSSES

MODES = ("parallel", "sequential", "correcting")


@dataclass(frozen=True, kw_only=True)
class ClosedFormConfig:
    """Settings of `dg.closed_form`.

    Attributes:
        steps: batches it sees, once more before that where `energy` asks for it; a few hundred samples do.
        ridge: pull towards the present weights, as a share of the mean square of a feature.
        energy: first measure which of the original's neurons are active, and start the narrower parts anew from those.
            Only parts that start warm and that nothing has trained yet.
        timesteps, seed: of the noise, see `diffusers_graft.training.noised_batch.Noising`.
        progress: show a bar, on a terminal.
    """

    steps: int = 16
    ridge: float = 1e-4
    energy: bool = True
    timesteps: str = "auto"
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        if type(self.steps) is not int or self.steps < 1 or not 0 < self.ridge < math.inf:
            raise TrainingError(f"A closed form needs at least one step and a positive ridge; got {self}.")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingConfig):
    """Settings of stage one, beside those of both stages (`diffusers_graft.training.config.TrainingConfig`).

    Without `lr`, the learning rate is 0.2 / width of the model.

    Attributes:
        loss: `"auto"` (the paper's choice: `l1` for attention, `l2` for feed-forwards), `l1`, `l2`, `huber` or
            `relative_l2`; or a loss for each rule key.
        lr_scale: factors on the learning rate by rule key.
        gated: compare outputs after the block's adaLN gate, as the block adds them, instead of raw outputs.
        sites: rule keys of the sites to train; None trains all. The teacher's forward ends after the last one.
        mode: where input and target of a new part come from. `"parallel"`: both from the original model (so does
            LoLCATs, arXiv 2410.10254). `"sequential"`: the input passed the new parts before it, and the target is
            what the original part gives for that input. `"correcting"`: the same input, and the target is the output
            of the original part in the original model, so that the part makes up for errors before it; this costs one
            more forward (compare asymmetric calibration, arXiv 2504.02692).
        closed_form: solve for output layers first, where parts have one (see `dg.closed_form`); a start that costs
            seconds.
        patience: a site that did not improve in so many evaluations is finished, and costs nothing more. None trains
            every site for all steps, so that each one has the end of the schedule, at a low learning rate.
        reuse, ring, memory: each batch of the teacher is used `reuse` times, from a buffer of up to `ring` batches
            that takes at most `memory` bytes (half of what is free, unless given); sites train in groups whose
            activations fit. On the testbed 4 takes half the time of 1 and is as good
            (examples/benchmarks/training-cpu.md). The default, 1, stores nothing, gives every part fresh noise at
            every step, and does not depend on the memory that is free.
        host: keep the buffer in the host's memory instead of the device's.
        split_sites: each of several processes trains its own share of the sites, on whole batches, where the new parts
            with their gradients and optimizers do not fit one device. The result is that of one process.
    """

    # Parts learn by themselves, so that a rate may be higher than that of the whole model.
    rate_of_width: ClassVar[float] = 0.2

    loss: str | Mapping[str, str] = "auto"
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    gated: bool = False
    sites: str | tuple[str, ...] | None = None
    mode: str = "parallel"
    max_grad_norm: float = 10.0
    closed_form: ClosedFormConfig | None = None
    patience: int | None = None
    reuse: int = 1
    ring: int = 16
    memory: int | None = None
    host: bool = False
    split_sites: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in _values_by_site(self.loss):
            require_one_of("loss", name, ("auto", *LOSSES))
        require_one_of("mode", self.mode, MODES)
        # A buffer of one batch would give it in the same order every time.
        counts = [self.reuse, self.ring]
        counts += [count for count in (self.patience, self.memory) if count is not None]
        if not all(isinstance(count, int) and count >= 1 for count in counts) or self.ring < 2:
            raise TrainingError(f"Counts are whole numbers from one, a ring's from two; got {self}.")
        if not all(isinstance(scale, int | float) for scale in _values_by_site(self.lr_scale)):
            raise TrainingError(f"Factors on the learning rate are numbers; got {self.lr_scale!r}.")
        if not isinstance(self.closed_form, ClosedFormConfig | None):
            raise TrainingError(f"closed_form takes a dg.ClosedFormConfig(), or None; got {self.closed_form!r}.")
        if self.reuse > 1 and self.mode != "parallel":
            raise TrainingError(
                f'reuse stores what the original model did, and mode="{self.mode}" changes it: choose one of them.'
            )
        if self.split_sites and (self.patience is not None or self.reuse > 1 or self.mode != "parallel"):
            raise TrainingError(
                "With split_sites, processes know their own sites alone: set patience=None, reuse=1 and "
                'mode="parallel", or split_sites=False.'
            )

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the weights: who computes what does not."""
        settings = super().identity()
        del settings["split_sites"]
        return settings


def _values_by_site(setting: Any) -> list[Any]:
    """Return the values of a setting by rule key, or the one value for all sites."""
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]
