"""Operators that break a promise, one for each check; the check of that name must catch them."""
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_graft import check_operator
from diffusers_graft.errors import GeometryError
from diffusers_graft.operators import FeedForwardOperator, Mixer, _checks, conformance
from diffusers_graft.site import Context


class Good(Mixer):
    """Softmax attention with a learnable gate; keeps every promise until a subclass breaks one."""

    name = "good"

    def __init__(self, config, site):
        super().__init__(config, site)
        self.gate = nn.Parameter(torch.ones(site.head_width))

    def forward(self, query, key, value, context):
        return F.scaled_dot_product_attention(query, key, value) * self.gate

    def flops(self, tokens):
        return 4 * tokens**2 * self.site.inner_width


class ForgetsSetting(Good):
    @dataclass(frozen=True, kw_only=True)
    class Config(Good.Config):
        kept: int = 1

        def to_dict(self):
            return {"operator": "self_attention", "init": self.init}


class WrongShape(Good):
    def forward(self, query, key, value, context):
        return super().forward(query, key, value, context)[:, :, :-1]


class WrongDtype(Good):
    def forward(self, query, key, value, context):
        return super().forward(query, key, value, context).double()


class Imprecise(Good):
    def forward(self, query, key, value, context):
        mixed = super().forward(query, key, value, context)
        return mixed.round() if value.dtype == torch.bfloat16 else mixed


class Overflows(Good):
    def forward(self, query, key, value, context):
        return query.square().square().exp().sqrt() - query.square().square().exp().sqrt() + super().forward(
            query, key, value, context)  # fmt: skip


class EightByEight(Good):
    def forward(self, query, key, value, context):
        return super().forward(query, key, value, context) * (1.0 if query.shape[2] == 64 else float("nan"))


class HidesItsGrid(Good):
    def forward(self, query, key, value, context):
        context.require_grid(self.name, query.shape[2])
        return super().forward(query, key, value, context)


class ClaimsAGrid(Good):
    needs_grid = True


class DeadParameter(Good):
    def forward(self, query, key, value, context):
        return F.scaled_dot_product_attention(query, key, value) * self.gate.detach()


class MixesRows(Good):
    def forward(self, query, key, value, context):
        return super().forward(query, key, value - value.mean(0, keepdim=True), context)


class Counts(Good):
    calls = 0

    def forward(self, query, key, value, context):
        self.calls += 1
        return super().forward(query, key, value, context) * (1 + 0.01 * self.calls)


class ChangesInputs(Good):
    def forward(self, query, key, value, context):
        mixed = super().forward(query, key, value, context)
        if not query.requires_grad:
            query.mul_(0.5)
        return mixed


class DrawsNumbers(Good):
    def forward(self, query, key, value, context):
        torch.rand(1)
        return super().forward(query, key, value, context)


class OwnDice(Good):
    def __init__(self, config, site):
        super().__init__(config, site)
        self.gate.data = torch.randn(site.head_width, generator=torch.Generator().manual_seed(torch.seed() % 2**31))


class UnsavedState(Good):
    def __init__(self, config, site):
        super().__init__(config, site)
        self.hidden = torch.randn(site.head_width, dtype=torch.float64)

    def forward(self, query, key, value, context):
        return super().forward(query, key, value, context) + self.hidden.to(value.dtype)


class PinnedDevice(Good):
    def __init__(self, config, site):
        super().__init__(config, site)
        self.gate = nn.Parameter(torch.ones(site.head_width, device="cpu"))


class BreaksTheGraph(Good):
    def forward(self, query, key, value, context):
        torch._dynamo.graph_break()
        return super().forward(query, key, value, context)


class WrongFastPath(Good):
    def reference(self, query, key, value, context):
        return self(query, key, 1.01 * value, context)


class SaysCausal(Good):
    causal_operator = True


class SaysNothingOfCausal(Good):
    def forward(self, query, key, value, context):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True) * self.gate


class Understates(Good):
    def flops(self, tokens):
        return 2 * tokens**2 * self.site.inner_width


class MixingFeedForward(FeedForwardOperator):
    def __init__(self, config, site):
        super().__init__(config, site)
        self.line = nn.Linear(site.width, site.width)

    def forward(self, hidden_states, context):
        return self.line(hidden_states - hidden_states.mean(1, keepdim=True))

    def flops(self, tokens):
        return 2 * tokens * self.site.width**2


class Uncheckpointable(Good):
    """Computes something else when it is run again within the backward pass."""

    runs = 0

    def forward(self, query, key, value, context):
        self.runs += 1
        return super().forward(query * (2.0 if self.runs == 3 else 1.0), key, value, context)


BAD = {
    "config_round_trip": [ForgetsSetting], "shape_and_dtype": [WrongShape, WrongDtype], "bfloat16_close": [Imprecise],
    "finite_on_large_inputs": [Overflows], "every_grid": [EightByEight], "needs_grid": [HidesItsGrid, ClaimsAGrid],
    "gradients_reach_everything": [DeadParameter], "batch_rows_independent": [MixesRows], "deterministic": [Counts],
    "leaves_inputs_alone": [ChangesInputs], "leaves_generators_alone": [DrawsNumbers], "same_seed_same_start": [OwnDice],
    "state_dict_round_trip": [UnsavedState], "builds_on_meta": [PinnedDevice], "compiles": [BreaksTheGraph],
    "checkpointing": [Uncheckpointable], "agrees_with_reference": [WrongFastPath],
    "sees_ahead": [SaysCausal, SaysNothingOfCausal], "feed_forward_stays_in_place": [MixingFeedForward],
    "flops": [Understates],
}  # fmt: skip


def subject_of(operator):
    kind = operator.kinds[0]
    return _checks.Subject(operator.Config(), conformance.example_site(kind))


PAIRS = [(check, operator) for check, bad in BAD.items() for operator in bad]


@pytest.mark.parametrize(("check", "operator"), PAIRS, ids=lambda item: getattr(item, "__name__", item))
def test_check_catches(check, operator):
    with pytest.raises(conformance.ConformanceError, match=f"^{check}: "):
        getattr(_checks, f"check_{check}")(subject_of(operator))


def test_every_check_is_tested():
    assert set(BAD) == {check.__name__.removeprefix("check_") for check in _checks.CHECKS}


def test_a_good_operator_passes_the_same_checks(monkeypatch):
    monkeypatch.setattr(conformance, "configure", lambda spec: spec if not isinstance(spec, dict) else Good.Config())
    assert len(check_operator(Good.Config()).passed) >= 17


def test_context_without_grid_is_refused_in_words():
    with pytest.raises(GeometryError, match="gave no grid"):
        Context().require_grid("x", 4)
