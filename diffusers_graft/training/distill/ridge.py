"""A start without gradients: the output layer of every new part, solved by ridge regression on what the old part
gives.

Hooks on the untouched model hand each new part the arguments the old one received, as in stage one. What enters its
output layer (features X) and what its answer misses (R) go into the normal equations of min |X S - R|^2 + ridge |S|^2,
whose solution S is added to the layer's weights: the solution stays near them where data says nothing. Only X^T X and
X^T R are
kept, in float64, so memory does not grow with samples: 8 (F + 1)^2 bytes a site for a layer of F inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from tqdm.auto import tqdm

from ...core.sites import Site
from ...errors import OperatorError, StateError, TrainingError
from ...injection.graft import Graft, is_enabled
from ...injection.install import ContextReader, require_built_beside
from ...inspection import evaluating, linear_pair, predict
from ...operators import Mixer
from ...planning.plan import Edit
from ..batches import Batch, BatchStream
from ..config import config_or_default
from ..noised_batch import Noising
from .config import ClosedFormConfig

Run = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SolvedSite:
    """What the solution left of a site's error, on the very batches that were solved for.

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
        return {**asdict(self), "site": self.site.address}


class _Regression:
    """The normal equations of one output layer."""

    def __init__(self, site: Site, seat: nn.Module, layer: nn.Linear):
        self.site, self.seat, self.layer, self.heard = site, seat, layer, None
        features = layer.in_features + (layer.bias is not None)
        precise = {"dtype": torch.float64, "device": layer.weight.device}
        self.gram, self.cross = (
            torch.zeros(features, features, **precise),
            torch.zeros(features, layer.out_features, **precise),
        )
        self.missed, self.wanted, self.tokens = torch.zeros((), **precise), torch.zeros((), **precise), 0

    def hear(self, layer: nn.Linear, args: tuple, output: torch.Tensor) -> None:
        """Forward hook of the output layer."""
        self.heard = args[0], output

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        """Forward hook of the old part. Returns None, so the model runs on untouched."""
        answer = self.seat(*args, **kwargs)
        (features, given), self.heard = self.heard, None
        self._check(answer, output, features, given)
        self._add(features, (output.double() - answer.double()).reshape(given.shape), output.double())

    def _check(self, answer: torch.Tensor, output: torch.Tensor, features: torch.Tensor, given: torch.Tensor) -> None:
        one = isinstance(answer, torch.Tensor) and answer.numel() == given.numel()
        if one and not all(tensor.isfinite().all() for tensor in (features, given, output)):
            raise TrainingError(
                f"Closed form: values at {self.site.address} are not finite. Look at the batches for them."
            )
        if not one or not torch.equal(answer.flatten(), given.flatten()):
            raise OperatorError(
                f"{self.site.address} does more to the output of its last linear layer than pass it on, so that cannot be "
                "solved for. Leave this site out of the plan, or teach it by distill."
            )

    def _add(self, features: torch.Tensor, residual: torch.Tensor, target: torch.Tensor) -> None:
        rows, residual = features.double().flatten(0, -2), residual.flatten(0, -2)
        if self.layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.gram.addmm_(rows.T, rows)
        self.cross.addmm_(rows.T, residual)
        self.missed += residual.square().sum()
        self.wanted += target.square().sum()
        self.tokens += len(rows)

    def solve(self, ridge: float) -> SolvedSite:
        """Find what is to be added to the layer's weights."""
        pulled = self.gram.clone()
        pulled.diagonal().add_((ridge * self.gram.trace() / len(self.gram)).clamp(min=1e-30))
        factor, failed = torch.linalg.cholesky_ex(pulled)
        if failed:
            raise TrainingError(
                f"Closed form: at {self.site.address} the features of {self.tokens} tokens are too much alike for a ridge of "
                f"{ridge:g}. Take more batches, or a larger ridge such as 1e-4."
            )
        self.solution = solution = torch.cholesky_solve(self.cross, factor)
        left = self.missed + (solution * (self.gram @ solution - 2 * self.cross)).sum()
        return self._report(left.clamp(min=0))

    def take(self) -> None:
        """Add it."""
        self.layer.weight += self.solution[: self.layer.in_features].T.to(self.layer.weight.dtype)
        if self.layer.bias is not None:
            self.layer.bias += self.solution[-1].to(self.layer.bias.dtype)

    def _report(self, left: torch.Tensor) -> SolvedSite:
        count, wanted = self.tokens * self.layer.out_features, self.wanted.clamp(min=1e-24)
        return SolvedSite(
            site=self.site,
            tokens=self.tokens,
            first_loss=(self.missed / count).item(),
            last_loss=(left / count).item(),
            first_error=(self.missed / wanted).sqrt().item(),
            relative_error=(left / wanted).sqrt().item(),
        )


class _Energy:
    """Mean square of every hidden neuron of one original."""

    def __init__(self, site: Site):
        self.site, self.squares, self.tokens = site, 0.0, 0

    def hook(self, layer: nn.Linear, args: tuple) -> None:
        """Forward pre-hook of the original's output layer."""
        hidden = args[0].double().flatten(0, -2)
        self.squares, self.tokens = self.squares + hidden.square().sum(0), self.tokens + len(hidden)

    def mean(self) -> torch.Tensor:
        if not torch.isfinite(self.squares).all():
            raise TrainingError(f"Closed form: neurons of {self.site.address} are not finite. Look at the batches.")
        return self.squares / self.tokens


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
    if not (regressions := {edit.site.path: r for edit in edits if (r := _regression(graft, edit)) is not None}):
        raise OperatorError(
            "No part of this graft ends in a linear layer, so there is nothing to solve for. Use dg.distill."
        )
    run = _runner(model, batches, config, noise_scheduler)
    with _untouched(model, graft, config.seed):
        if config.energy and not any("stage" in row for row in graft.history):
            _start_from_energy(model, graft, edits, run)
        _collect(model, regressions, run)
    reports = {r.site.address: r.solve(config.ridge) for r in regressions.values()}
    for regression in regressions.values():  # only once all are solved
        regression.take()
    graft.history.append(
        {"stage": "closed form", **asdict(config), "sites": [report.to_dict() for report in reports.values()]}
    )
    return reports


def _runner(
    model: ModelMixin, batches: Iterable[Batch], config: ClosedFormConfig, scheduler: SchedulerMixin | None
) -> Run:
    """A function that runs the model on the next batches, under a name for the bar."""
    stream, generator = BatchStream(batches), torch.Generator().manual_seed(config.seed)
    noising = Noising(scheduler=scheduler, timesteps=config.timesteps)
    noising.require_usable(model, stream.peek())

    def run(name: str) -> None:
        with tqdm(total=config.steps, desc=name, unit="step", disable=None if config.progress else True) as bar:
            for _, batch in zip(range(config.steps), stream, strict=False):
                predict(model, noising(model, batch, generator).inputs)
                bar.update()

    return run


def output_layer(seat: nn.Module) -> nn.Linear | None:
    """The linear layer that a new part's output comes from, where it has one: a mixer's is the attention's."""
    if isinstance(seat.graft, Mixer):
        layer = (getattr(seat, "to_out", None) or [None])[0]
    else:
        layer = seat.graft.output_layer and seat.graft.get_submodule(seat.graft.output_layer)
    return layer if isinstance(layer, nn.Linear) else None


def _regression(graft: Graft, edit: Edit) -> _Regression | None:
    """Of a layer of its own: that of a mixer is shared with the original until now."""
    seat = graft.seats[edit.site.path]
    if isinstance(seat.graft, Mixer):
        graft.untie(edit.site.path, {"to_out"})
    layer = output_layer(seat)
    return None if layer is None else _Regression(edit.site, seat, layer)


@contextmanager
def _untouched(model: ModelMixin, graft: Graft, seed: int) -> Iterator[None]:
    """Everything in evaluation mode, the context of each forward read, and no trace of it afterwards."""
    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # alone: those of GPUs are not forked
        for module in (model, *graft.seats.values()):
            stack.enter_context(evaluating(module))
        stack.callback(model.register_forward_pre_hook(ContextReader(graft, model), with_kwargs=True).remove)
        yield


def _collect(model: ModelMixin, regressions: dict[str, _Regression], run: Run) -> None:
    with ExitStack() as hooks:
        for path, regression in regressions.items():
            hooks.callback(regression.layer.register_forward_hook(regression.hear).remove)
            part = model.get_submodule(path)
            hooks.callback(part.register_forward_hook(regression.hook, with_kwargs=True).remove)
        run("closed form")


def _start_from_energy(model: ModelMixin, graft: Graft, edits: list[Edit], run: Run) -> None:
    """Start anew, from the neurons that are active on data, the parts that ask for it."""
    starting = [e for e in edits if graft.seats[e.site.path].graft.uses_energy and e.config.init == "warm"]
    if not starting:
        return
    meters = {edit.site.path: _Energy(edit.site) for edit in starting}
    with ExitStack() as hooks:
        for path, meter in meters.items():
            original = model.get_submodule(path)
            down = linear_pair(original).down
            last = next(layer for layer in original.modules() if getattr(layer, "weight", None) is down)
            hooks.callback(last.register_forward_pre_hook(meter.hook).remove)
        run("energy of neurons")
    for path, meter in meters.items():
        pair = linear_pair(model.get_submodule(path))
        graft.seats[path].graft.init_from(replace(pair, energy=meter.mean()))
