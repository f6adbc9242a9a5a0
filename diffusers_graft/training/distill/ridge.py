"""Closed-form start: the output layer of every new part, solved by ridge regression on the original part's output.

Hooks on the original model give each new part the inputs that the old one received, as in stage one. The input of its
output layer (features X) and the error of its output (residual R) go into the normal equations of
min |X S - R|^2 + ridge |S|^2, whose solution S is added to the layer's weights: it stays near zero where the data
determine nothing. Only X^T X and X^T R are stored, in float64, so memory does not grow with samples: 8 (F + 1)^2 bytes
a site for a layer of F inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from tqdm.auto import tqdm

from ...core.progress import hide_bar
from ...core.sites import Site
from ...errors import OperatorError, StateError, TrainingError
from ...injection.graft import Graft, is_enabled
from ...injection.install import ContextReader, require_built_beside
from ...inspection import evaluating, linear_pair, predict
from ...operators import Mixer, Operator
from ...planning.plan import Edit
from .. import distributed as processes
from ..batches import Batch, BatchStream, Share
from ..config import config_or_default
from ..noised_batch import Noising
from ..random_state import seeded
from .config import ClosedFormConfig

# Runs the model on the next batches; the text names the progress bar.
ModelRunner = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SolvedSite:
    """Error of a site before and after the solution, on the batches that were solved for.

    Attributes:
        tokens: rows of the regression.
        first_loss, last_loss: mean squared error before and after.
        first_error, relative_error: |new - old| / |old| (L2) before and after.
    """

    site: Site
    tokens: int
    first_loss: float
    last_loss: float
    first_error: float
    relative_error: float

    def to_dict(self) -> dict[str, int | float | str]:
        """Return the report, JSON-able."""
        return {**asdict(self), "site": self.site.address}


class _Regression:
    """Normal equations of one output layer, in float64.

    Attributes:
        gram, cross: X^T X [F, F] and X^T R [F, D], of features with a column of ones where the layer has a bias.
        residual, target: sums of squares of the error and of the original's output.
        tokens: rows of X.
    """

    def __init__(self, site: Site, seat: nn.Module, layer: nn.Linear):
        self.site = site
        self.seat = seat
        self.layer = layer
        features = layer.in_features + (layer.bias is not None)
        # Squares of features lose half of the digits, so half precision and float32 are not enough.
        zeros = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
        self.gram = zeros.repeat(features, features)
        self.cross = zeros.repeat(features, layer.out_features)
        self.residual = zeros.clone()
        self.target = zeros.clone()
        self.tokens = 0
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None

    def capture_layer(self, layer: nn.Linear, args: tuple, output: torch.Tensor) -> None:
        """Store a call of the output layer (a forward hook)."""
        self._captured = (args[0], output)

    def capture_original(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        """Add a call of the old part to the sums (a forward hook); returns None, so the model runs on unchanged."""
        student = self.seat(*args, **kwargs)
        assert self._captured is not None
        features, layer_output = self._captured
        self._captured = None
        self._check(student, output, features, layer_output)
        # The layer has a start already, and only its error is solved for.
        residual = (output.double() - student.double()).reshape(layer_output.shape)
        self._add(features, residual, output.double())

    def _check(
        self, student: torch.Tensor, output: torch.Tensor, features: torch.Tensor, layer_output: torch.Tensor
    ) -> None:
        is_same_size = isinstance(student, torch.Tensor) and student.numel() == layer_output.numel()
        if is_same_size and not all(tensor.isfinite().all() for tensor in (features, layer_output, output)):
            raise TrainingError(
                f"Closed form: values at {self.site.address} are not finite. Look at the batches for them."
            )
        if not is_same_size or not torch.equal(student.flatten(), layer_output.flatten()):
            raise OperatorError(
                f"{self.site.address} does more to the output of its last linear layer than pass it on, so that "
                "cannot be solved for. Leave this site out of the plan, or train it by distill."
            )

    def _add(self, features: torch.Tensor, residual: torch.Tensor, target: torch.Tensor) -> None:
        rows = features.double().flatten(0, -2)
        residual = residual.flatten(0, -2)
        if self.layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.gram.addmm_(rows.T, rows)
        self.cross.addmm_(rows.T, residual)
        self.residual += residual.square().sum()
        self.target += target.square().sum()
        self.tokens += len(rows)

    def solve(self, ridge: float) -> SolvedSite:
        """Find what is to be added to the layer's weights. Raises `TrainingError` for dependent features."""
        regularized = self.gram.clone()
        # Relative to the mean square of a feature, so that one ridge suits layers of all scales.
        regularized.diagonal().add_((ridge * self.gram.trace() / len(self.gram)).clamp(min=1e-30))
        factor, failed = torch.linalg.cholesky_ex(regularized)
        if failed:
            raise TrainingError(
                f"Closed form: at {self.site.address} the features of {self.tokens} tokens are too much alike for a "
                f"ridge of {ridge:g}. Take more batches, or a larger ridge such as 1e-4."
            )
        self.solution = torch.cholesky_solve(self.cross, factor)
        # |R - X S|^2 from the sums alone, since the rows are gone.
        change = (self.solution * (self.gram @ self.solution - 2 * self.cross)).sum()
        remaining = (self.residual + change).clamp(min=0)
        count = self.tokens * self.layer.out_features
        target = self.target.clamp(min=1e-24)
        return SolvedSite(
            site=self.site,
            tokens=self.tokens,
            first_loss=(self.residual / count).item(),
            last_loss=(remaining / count).item(),
            first_error=(self.residual / target).sqrt().item(),
            relative_error=(remaining / target).sqrt().item(),
        )

    def apply(self) -> None:
        """Add the solution to the layer's weights."""
        self.layer.weight.add_(self.solution[: self.layer.in_features].T.to(self.layer.weight.dtype))
        if self.layer.bias is not None:
            self.layer.bias.add_(self.solution[-1].to(self.layer.bias.dtype))


class _Energy:
    """Mean square and mean of every hidden neuron of one original."""

    def __init__(self, site: Site):
        self.site = site
        self.squares = torch.zeros((), dtype=torch.float64)
        self.sums = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def capture_neurons(self, layer: nn.Linear, args: tuple) -> None:
        """Add up the inputs of the original's output layer and their squares (a forward pre-hook)."""
        hidden = args[0].double().flatten(0, -2)
        self.squares = self.squares + hidden.square().sum(0)
        self.sums = self.sums + hidden.sum(0)
        self.tokens += len(hidden)

    def measured(self) -> dict[str, torch.Tensor]:
        """Return `energy` and `mean` of each neuron. Raises `TrainingError` for values that are not finite."""
        if not torch.isfinite(self.squares).all():
            raise TrainingError(f"Closed form: neurons of {self.site.address} are not finite. Look at the batches.")
        return {"energy": self.squares / self.tokens, "mean": self.sums / self.tokens}


@torch.inference_mode(False)
@torch.no_grad()
def closed_form(
    model: ModelMixin,
    graft: Graft,
    batches: Iterable[Batch],
    config: ClosedFormConfig | None = None,
    *,
    noise_scheduler: SchedulerMixin | None = None,
    paths: Collection[str] | None = None,
) -> dict[str, SolvedSite]:
    """Solve for the output layer of every part of a graft, so that it does what the part it replaces does.

    Parts whose output comes from no linear layer of their own (see `Operator.output_layer`) stay as they are.

    Args:
        model: the model the graft was built beside; intact, not grafted. It is not changed.
        graft: from `build_graft`; changed in place.
        batches: see `diffusers_graft.training.batches`: dicts with a clean `sample` and conditioning, or complete
            model arguments.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        paths: of the sites to solve; all of the graft's unless given.

    Returns:
        A report for every site that was solved, by address; its errors are those on the batches it was solved for.

    Raises:
        StateError: the graft is running: its parts would be compared with themselves; or it is no graft of this model.
        OperatorError: no part, or one whose output layer cannot be solved for.
        TrainingError: values that are not finite, batches that ran out, or other settings.
    """
    config = config_or_default(config, ClosedFormConfig)
    if is_enabled(model):
        raise StateError(
            "A closed form watches the original parts: call model.unset_graft() or model.disable_graft() first."
        )
    require_built_beside(model, graft)
    edits = [edit for edit in graft.plan.edits if paths is None or edit.site.path in paths]
    regressions = _make_regressions(graft, edits)
    if not regressions:
        raise OperatorError(
            "No part of this graft ends in a linear layer, so there is nothing to solve for. Use dg.distill."
        )
    run = _make_runner(model, batches, config, noise_scheduler)
    with _prepared(model, graft, config.seed):
        # A part that something trained would lose what it has learned.
        if config.energy and not any("stage" in row for row in graft.history):
            _start_from_energy(model, graft, edits, run)
        _collect(model, regressions, run)
    reports = {regression.site.address: regression.solve(config.ridge) for regression in regressions.values()}
    # Only once all are solved, so that an error leaves every part as it was.
    for regression in regressions.values():
        regression.apply()
    graft.history.append(
        {"stage": "closed form", **asdict(config), "sites": [report.to_dict() for report in reports.values()]}
    )
    return reports


def _make_runner(
    model: ModelMixin, batches: Iterable[Batch], config: ClosedFormConfig, scheduler: SchedulerMixin | None
) -> ModelRunner:
    """Return a function that runs the model on the next batches."""
    stream = BatchStream(batches)
    generator = torch.Generator().manual_seed(config.seed)
    noising = Noising(scheduler=scheduler, timesteps=config.timesteps)
    noising.require_usable(model, stream.peek())

    def run(name: str) -> None:
        with tqdm(total=config.steps, desc=name, unit="step", disable=hide_bar(config.progress)) as bar:
            for _, batch in zip(range(config.steps), stream, strict=False):
                # Every process solves the same equations, so each needs all samples.
                if isinstance(batch, Share):
                    batch = processes.join_shares(batch)
                predict(model, noising(model, batch, generator).inputs)
                bar.update()

    return run


def output_layer(seat: nn.Module) -> nn.Linear | None:
    """Return the linear layer that a new part's output comes from, where it has one: a mixer's is the attention's."""
    operator = cast(Operator, seat.graft)
    layer = None
    if isinstance(operator, Mixer):
        if getattr(seat, "to_out", None):
            layer = cast(nn.ModuleList, seat.to_out)[0]
    elif operator.output_layer:
        layer = operator.get_submodule(operator.output_layer)
    return layer if isinstance(layer, nn.Linear) else None


def _make_regressions(graft: Graft, edits: list[Edit]) -> dict[str, _Regression]:
    """Create the regression of every part with an output layer, by path."""
    regressions = {}
    for edit in edits:
        seat = graft.seats[edit.site.path]
        if isinstance(seat.graft, Mixer):
            # The layer would change in the original too, which it is shared with.
            graft.untie(edit.site.path, {"to_out"})
        layer = output_layer(seat)
        if layer is not None:
            regressions[edit.site.path] = _Regression(edit.site, seat, layer)
    return regressions


@contextmanager
def _prepared(model: ModelMixin, graft: Graft, seed: int) -> Iterator[None]:
    """Put everything in evaluation mode and read the context of each forward inside; undo it afterwards."""
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, torch.device("cpu")))
        for module in (model, *graft.seats.values()):
            stack.enter_context(evaluating(module))
        stack.callback(model.register_forward_pre_hook(ContextReader(graft, model), with_kwargs=True).remove)
        yield


def _collect(model: ModelMixin, regressions: dict[str, _Regression], run: ModelRunner) -> None:
    """Run the model, and add every call of a part to its regression."""
    with ExitStack() as hooks:
        for path, regression in regressions.items():
            hooks.callback(regression.layer.register_forward_hook(regression.capture_layer).remove)
            part = model.get_submodule(path)
            hooks.callback(part.register_forward_hook(regression.capture_original, with_kwargs=True).remove)
        run("closed form")


def _start_from_energy(model: ModelMixin, graft: Graft, edits: list[Edit], run: ModelRunner) -> None:
    """Start the parts that use energy anew, from the neurons that are active on data."""
    operators = graft.operators()
    meters = {}
    for edit in edits:
        if operators[edit.site.path].uses_energy and edit.config.init == "warm":
            meters[edit.site.path] = _Energy(edit.site)
    if not meters:
        return
    with ExitStack() as hooks:
        for path, meter in meters.items():
            original = model.get_submodule(path)
            last = [layer for layer in original.modules() if isinstance(layer, nn.Linear)][-1]
            hooks.callback(last.register_forward_pre_hook(meter.capture_neurons).remove)
        run("energy of neurons")
    for path, meter in meters.items():
        pair = linear_pair(model.get_submodule(path))
        operators[path].init_from(replace(pair, **meter.measured()))
