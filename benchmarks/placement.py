"""Placement that is learned with everything frozen: a gate a site mixes the original part and its candidates.

The shares of a mixture are the softmax of its logits. They follow the distance of the model's output from the
original's, and a penalty on what the mixture leaves above the budget. It is how DASH (differentiable architecture
search) chooses among operations; as there, parts are mixed while shares are learned, and one of them is taken after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from diffusers_graft.injection.checkpointing import forget_contexts
from diffusers_graft.injection.install import ContextReader
from diffusers_graft.inspection import predict
from diffusers_graft.planning.plan import Edit, GraftPlan
from diffusers_graft.search.planner import Survey
from diffusers_graft.testbed.sampling import scheduler
from diffusers_graft.training.batches import Batch
from diffusers_graft.training.noised_batch import Noising

LEARNING_RATE = 0.1
# Harm that is paid for a share of FLOPs above the budget; more than plans on the front pay, so that none stays above.
PENALTY = 1.0


class Gate(nn.Module):
    """A site's original part and its candidates, mixed.

    Attributes:
        edits: of the candidates.
        saved: shares of FLOPs that original and candidates save.
        is_original: run the original alone.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList([original])
        self.edits: list[Edit] = []
        self.saved = torch.zeros(1)
        self.is_original = False

    def add(self, edit: Edit, part: nn.Module, saved: float) -> None:
        """Add a candidate."""
        self.edits.append(edit)
        self.parts.append(part)
        self.saved = torch.cat([self.saved, torch.tensor([saved])])
        self.logits = nn.Parameter(torch.zeros(len(self.parts)))

    def forward(self, *args, **kwargs) -> torch.Tensor:
        if self.is_original:
            return self.parts[0](*args, **kwargs)
        mixed = [share * part(*args, **kwargs) for share, part in zip(self.shares(), self.parts, strict=True)]
        return torch.stack(mixed).sum(0)

    def shares(self) -> torch.Tensor:
        """Return the shares of original and candidates, which add up to one."""
        return self.logits.softmax(0)


@contextmanager
def gated(model: DiTTransformer2DModel, found: Survey) -> Iterator[list[Gate]]:
    """Put a gate at every site that was surveyed, for the block."""
    gates: dict[str, Gate] = {}
    for choice in found.choices:
        path = choice.edit.site.path
        graft = next(graft for graft in found.grafts if choice.edit in graft.plan.edits)
        gates.setdefault(path, Gate(graft.originals[path]))
        gates[path].add(choice.edit, graft.seats[path], choice.saved["flops"])
    readers = [ContextReader(graft, model) for graft in found.grafts]
    handles = [model.register_forward_pre_hook(reader, with_kwargs=True) for reader in readers]
    for path, gate in gates.items():
        model.set_submodule(path, gate)
    try:
        yield list(gates.values())
    finally:
        for path, gate in gates.items():
            model.set_submodule(path, gate.parts[0])
        for handle in handles:
            handle.remove()
        forget_contexts(model)


def learn_placement(
    model: DiTTransformer2DModel, found: Survey, batches: Iterable[Batch], budget: float, steps: int, seed: int
) -> GraftPlan:
    """Return the plan that learned gates choose under a budget of FLOPs.

    Args:
        budget: share of the original's FLOPs.
        steps: of the gates' optimizer, each a forward of the original and one of all parts, with a backward.
    """
    noising = Noising(scheduler=scheduler(), timesteps="uniform", drop_labels=False)
    generator = torch.Generator().manual_seed(seed)
    with gated(model, found) as gates:
        logits = [gate.logits for gate in gates]
        optimizer = torch.optim.Adam(logits, lr=LEARNING_RATE)
        for batch in islice(batches, steps):
            inputs = noising(model, batch, generator).inputs
            loss = _loss(model, gates, inputs, budget)
            for logit, gradient in zip(logits, torch.autograd.grad(loss, logits), strict=True):
                logit.grad = gradient
            optimizer.step()
        chosen = _round(gates, 1 - budget)
    return GraftPlan(found.model_class, tuple(choice.edit for choice in found.choices if choice.edit in chosen))


def _loss(model: DiTTransformer2DModel, gates: list[Gate], inputs: dict, budget: float) -> torch.Tensor:
    for gate in gates:
        gate.is_original = True
    with torch.no_grad():
        answer = predict(model, inputs)
    for gate in gates:
        gate.is_original = False
    harm = (predict(model, inputs) - answer).square().sum() / answer.square().sum()
    saved = torch.stack([(gate.shares() * gate.saved).sum() for gate in gates]).sum()
    return harm + PENALTY * (1 - saved - budget).relu()


@torch.no_grad()
def _round(gates: list[Gate], needed: float) -> set[Edit]:
    """Return the candidates of the largest logits, with as small a bonus for what is saved as meets the budget."""
    low = 0.0
    high = 1e4
    for _ in range(60):
        middle = (low + high) / 2
        if _saved(gates, _choose(gates, middle)) >= needed:
            high = middle
        else:
            low = middle
    numbers = _choose(gates, high)
    pairs = zip(gates, numbers, strict=True)
    return {gate.edits[number - 1] for gate, number in pairs if number}


def _choose(gates: list[Gate], bonus: float) -> list[int]:
    return [int((gate.logits + bonus * gate.saved).argmax()) for gate in gates]


def _saved(gates: list[Gate], numbers: list[int]) -> float:
    return sum(gate.saved[number].item() for gate, number in zip(gates, numbers, strict=True))
