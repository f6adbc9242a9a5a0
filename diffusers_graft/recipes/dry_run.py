"""What a recipe will take, before anything is downloaded or trained: measured on the meta device, where tensors have
shapes and no values.

A step of each stage runs there with the parts that train for real: the same seats, hooks, losses and optimizers. Peaks
are of the tensors that are alive at once; fragmentation and the kernels' workspaces come on top.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from ..core.tables import Table
from ..errors import GraftError
from ..evaluation.benchmark import PeakMemory
from ..evaluation.cost import count_flops, count_parameters
from ..injection.graft import Graft, build_graft
from ..injection.install import install
from ..inspection import evaluating, find_sites, predict
from ..planning.plan import GraftPlan
from ..training.distill.capture import Capture
from ..training.distill.distill import by_site
from ..training.distill.stage import make_students
from ..training.distill.student import Student
from ..training.finetune.finetune import prepared
from ..training.finetune.objective import denoising_loss
from ..training.finetune.stage import make_optimizer
from ..training.finetune.teacher import Teacher
from .architecture import Architecture, list_downloads, read_architecture
from .data import require_data
from .run import choose_local, resolve_plan
from .schema import Recipe

# Bytes of a checkpoint for each byte of the weights that are trained: they, Adam's two moments, and the best so far.
_CHECKPOINT = 4
# Latents are drawn in so many steps where the recipe does not say.
_SAMPLING_STEPS = 20


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage.

    Attributes:
        name: of the stage.
        weights: bytes of the weights on each device, of the model and of its new parts.
        state: bytes of gradients, optimizer, copies in float32 and copies of the best weights on each device.
        activations: bytes of everything else at the peak.
        disk: bytes that the stage writes.
        flops: of all its steps on all devices.
    """

    name: str
    weights: int = 0
    state: int = 0
    activations: int = 0
    disk: int = 0
    flops: int = 0

    @property
    def memory(self) -> int:
        """Bytes at the peak of each device."""
        return self.weights + self.state + self.activations


@dataclass(frozen=True)
class Costs:
    """What a recipe will take.

    Attributes:
        model_class: name of the diffusers class.
        sites: number of sites by kind.
        plan: as `GraftPlan.to_dict` gives it.
        parameters, flops: of the original and of the graft; FLOPs are of a forward of one sample.
        tokens: of that sample.
        stages: costs stage by stage.
        devices: among which weights are divided.
        downloads: bytes by file; None where the Hub was not asked.
        notes: in words, what is not counted.
    """

    model_class: str
    sites: dict[str, int]
    plan: dict[str, Any]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    tokens: int
    stages: tuple[StageCost, ...]
    devices: int
    downloads: dict[str, int] | None
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.sites.items())
        plan = GraftPlan.from_dict(self.plan)
        original, graft = self.parameters
        flops, graft_flops = self.flops
        rows = [
            (one.name, *map(_gigabytes, (one.memory, one.weights, one.state, one.activations, one.disk)))
            + (f"{one.flops / 1e15:.3g}",)
            for one in self.stages
        ]
        heading = ("", "memory, GB", "weights", "state", "activations", "disk, GB", "PFLOP")
        table = Table(rows, heading=heading, numbers=range(1, 7), is_ruled=True).to_text()
        words = "on one device" if self.devices == 1 else f"on each of {self.devices} devices, weights divided"
        return "\n".join(
            [
                f"{self.model_class}: {kinds}",
                f"\n{plan}\n",
                f"parameters {original:,} -> {graft:,} ({graft / original - 1:+.2%})",
                f"FLOPs of a sample of {self.tokens:,} tokens {flops / 1e12:.4g} T -> {graft_flops / 1e12:.4g} T "
                f"({graft_flops / flops - 1:+.2%})",
                f"\n{table}\nMemory {words}.",
                f"Download: {self._describe_downloads()}",
                *self.notes,
            ]
        )

    def _describe_downloads(self) -> str:
        if self.downloads is None:
            return "not known without the Hub."
        if not self.downloads:
            return "nothing, the model lies on this machine."
        return f"{len(self.downloads)} files, {_gigabytes(sum(self.downloads.values()))} GB."


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g}"


def estimate(recipe: Recipe, *, devices: int = 1) -> Costs:
    """Estimate what a recipe will take. Downloads configurations at most, and trains nothing.

    Args:
        devices: processes of the launch, each with a batch of its own; with several, weights are divided among them as
            FSDP2 does.

    Raises `GraftError` for a number of devices below one, and what a run of the recipe raises for its model and plan.
    """
    if devices < 1:
        raise GraftError(f"A run has one device or more; got {devices}.")
    found = read_architecture(recipe)
    model = found.model
    sites = Counter(site.kind for site in find_sites(model))
    plan, notes = _choose_plan(recipe, model)
    inputs = found.make_inputs(1)
    try:
        require_data(recipe)
    except GraftError as error:
        # A run would be refused; what it would take can be told all the same.
        notes.append(f"Not ready: {error}")
    original = count_parameters(model), count_flops(model, inputs)
    batch = found.make_inputs(recipe.data.batch_size)
    stages = [_cost_data(recipe, found, original[1])]
    graft = build_graft(model, plan)
    if recipe.distill is not None and graft.is_trainable:
        stages.append(_cost_distill(recipe, model, graft, batch, devices))
    install(model, graft)
    grafted = count_parameters(model), count_flops(model, inputs)
    if recipe.finetune is not None:
        stages.append(_cost_finetune(recipe, model, graft, batch, devices))
    return Costs(
        type(model).__name__,
        dict(sites),
        plan.to_dict(),
        (original[0], grafted[0]),
        (original[1], grafted[1]),
        found.tokens,
        tuple(stages),
        devices,
        list_downloads(recipe.model),
        (*found.notes, *notes),
    )


def _choose_plan(recipe: Recipe, model: ModelMixin) -> tuple[GraftPlan, list[str]]:
    """Return the plan of a recipe; of a search, that of its first candidates, with a note."""
    if isinstance(recipe.plan, Mapping):
        # Which layers are local is not known without weights, and costs are the same at any of them.
        addresses = [site.address for site in find_sites(model)]
        return resolve_plan(model, choose_local(recipe.plan, dict.fromkeys(addresses, 0.0))), []
    if recipe.plan is not None:
        return resolve_plan(model, recipe.plan), []
    assert recipe.search is not None
    first = {key: operators[0] for key, operators in recipe.search.candidates.items()}
    note = "The plan is a search's: counted with the first candidate at every site, which is more than it will be."
    return resolve_plan(model, first), [note]


def _cost_data(recipe: Recipe, found: Architecture, forward: int) -> StageCost:
    """Return what drawing a training set takes; other data are there already."""
    settings = recipe.data.synthetic
    # Data that are there already cost no drawing.
    if settings is None:
        return StageCost("data")
    sample = sum(_size(value) for value in _tensors(found.make_inputs(1)))
    steps = settings.arguments.get("num_inference_steps", _SAMPLING_STEPS)
    # Guidance asks for the prompt and for no prompt.
    calls = 1 if settings.arguments.get("guidance_scale") == 1 else found.calls_per_step
    return StageCost(
        "data",
        weights=_weight_bytes(found.model),
        disk=sample * settings.samples,
        flops=forward * steps * calls * settings.samples,
    )


def _cost_distill(
    recipe: Recipe, model: ModelMixin, graft: Graft, inputs: Mapping[str, Any], devices: int
) -> StageCost:
    assert recipe.distill is not None
    sites = [edit.site for edit in graft.plan.edits]
    config = recipe.distill.for_model(model, graft.sites)
    states: list[torch.Tensor] = []

    def make() -> Callable[[], None]:
        students = make_students(
            graft, sites, config, by_site(graft, config.loss, "auto"), by_site(graft, config.lr_scale, 1.0)
        )
        capture = Capture(model, graft)
        masters = [master for student in students.values() for master in student.optimizer.masters]
        # The best weights are remembered, since a recipe holds data out.
        states.extend(master.detach().clone() for master in masters)

        def visit(path: str, call: Any) -> None:
            students[path].train_on(call)

        def step() -> None:
            with evaluating(model), capture.hooks(gated=config.gated):
                for student in students.values():
                    student.seat.train()
                capture.run(dict(inputs), list(students), visit)
            for student in students.values():
                _take_step(student)

        return step

    before = _weight_bytes(model)
    peak, flops = _measure(make)
    trained = sum(map(_size, states))
    new = sum(_size(tensor) for path in graft.seats for tensor in graft.tensors_of(path).values())
    # What the students copied from the original counts among the weights.
    state = _state_bytes(graft, trained, new)
    steps = config.steps * config.accumulate * devices
    # The teacher is divided, and every process holds the new parts in full.
    weights = _divide(before, devices) + new
    return StageCost(
        "stage one",
        weights=weights,
        state=state,
        activations=max(0, peak - state - new) + _gathered(model, devices),
        disk=_CHECKPOINT * trained * config.keep + new,
        flops=flops * steps,
    )


def _state_bytes(graft: Graft, trained: int, weights: int) -> int:
    """Return the bytes of gradients, Adam's moments, the best weights, and float32 copies of weights in bfloat16."""
    copies = trained if weights < trained else 0
    return 4 * trained + copies


def _take_step(student: Student) -> None:
    student.optimizer.clip_gradients()
    student.pop_metrics()
    student.step(0.0, 0.0, 0.0)


def _cost_finetune(
    recipe: Recipe, model: ModelMixin, graft: Graft, inputs: Mapping[str, Any], devices: int
) -> StageCost:
    assert recipe.finetune is not None
    config = recipe.finetune.for_model(model, graft.sites)
    trained: list[torch.Tensor] = []
    before = _weight_bytes(model)
    saved = 0

    def make() -> Callable[[], None]:
        optimizer = make_optimizer(model, graft, config)
        features = config.distill_features or 0.0
        teacher = Teacher(
            model,
            output_weight=config.distill_output,
            feature_weight=features,
            needs_prediction=bool(config.match_distribution),
        )
        trained.extend(master.detach().clone() for master in optimizer.masters)

        def step() -> None:
            teacher.run(dict(inputs))
            with teacher.capture_features(model):
                prediction = predict(model, dict(inputs))
            target = torch.zeros_like(prediction)
            loss = config.denoising * denoising_loss(prediction, target)
            if config.match_distribution:
                # A second forward with a gradient: the last step of the trajectory.
                loss = loss + denoising_loss(predict(model, dict(inputs)), target)
            optimizer.backward(sum(teacher.losses(prediction).values(), start=loss))
            optimizer.clip_gradients()
            optimizer.step()

        return step

    with PeakMemory() as preparation, prepared(model, graft, config, [], False):
        held = preparation.now
        with torch.enable_grad():
            peak, flops = _measure(make)
        after = _weight_bytes(model)
        saved = sum(_size(tensor) for tensor in graft.tensors(model).values())
    size = sum(map(_size, trained))
    state = (4 + bool(config.average_decay)) * size
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        state += size
    activations = max(0, peak - state) + _gathered(model, devices)
    steps = config.steps * config.accumulate * devices
    if devices > 1 and config.uses_teacher:
        # Weights in shards cannot be exchanged, so the original stands beside them.
        held += before
    # The originals of weights that change stay beside the graft.
    weights = _divide(max(after, before) + held, devices)
    return StageCost(
        "stage two",
        weights=weights,
        state=_divide(state, devices),
        activations=activations,
        disk=_CHECKPOINT * size * config.keep + saved,
        flops=flops * steps,
    )


def _divide(size: int, devices: int) -> int:
    return math.ceil(size / devices)


def _gathered(model: ModelMixin, devices: int) -> int:
    """Return the bytes of the largest block, which FSDP gathers whole, with the next one; none on one device."""
    if devices == 1:
        return 0
    # FSDP wraps the blocks of these lists one by one.
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = [_weight_bytes(block) for one in lists for block in one]
    return 2 * max(blocks, default=0)


def _measure(make: Callable[[], Callable[[], None]]) -> tuple[int, int]:
    """Return the peak of bytes of two steps, whose second has the optimizer's state beside it, and FLOPs of one."""
    with PeakMemory() as memory, _fused_attention():
        step = make()
        step()
        step()
    # As matrix products, which the counter knows.
    with FlopCounterMode(display=False, custom_mapping=_FLOP_FORMULAS) as counter:
        step()
    return memory.peak, counter.get_total_flops()


def _convolution_backward_flops(gradient, inputs, weight, *settings, out_shape=None, **named) -> int:
    """Count the gradients that are asked for, each as much as the forward.

    torch's own count has as many channels too many as there are groups.
    """
    needs_prediction_for = settings[-1]
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * sum(needs_prediction_for[:2])


_FLOP_FORMULAS = {torch.ops.aten.convolution_backward: _convolution_backward_flops}


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Give softmax attention the memory of the fused kernels inside; on the meta device torch would spell it out.

    Set by name, since a mode of torch's would not reach blocks that are recomputed in the backward.
    """
    before = F.scaled_dot_product_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **settings: Any) -> torch.Tensor:
        return _FusedAttention.apply(query, key, value)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


class _FusedAttention(torch.autograd.Function):
    """Shapes of a fused softmax attention, forward and backward."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normaliser)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _weight_bytes(module: torch.nn.Module) -> int:
    return sum(map(_size, {id(one): one for one in [*module.parameters(), *module.buffers()]}.values()))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
