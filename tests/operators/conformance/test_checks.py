"""Operators that break a promise, one for each check; the check of that name must catch them."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_graft import check_operator
from diffusers_graft.core.context import Context
from diffusers_graft.errors import GeometryError, OperatorError
from diffusers_graft.operators import FeedForwardOperator, Mixer, available
from diffusers_graft.operators.conformance import checks as _checks
from diffusers_graft.operators.conformance import suite as conformance
from diffusers_graft.operators.conformance.case import Subject


class Good(Mixer):
    """Softmax attention with a learnable gate; keeps every promise until a subclass breaks one."""

    name = "good"

    def __init__(self, config, site):
        super().__init__(config, site)
        self.gate = nn.Parameter(torch.ones(site.head_width))

    def forward(self, query, key, value, context):
        return F.scaled_dot_product_attention(query, key, value, scale=context.scale) * self.gate

    def flops(self, tokens):
        return 4 * tokens**2 * self.site.inner_width


class ForgetsSetting(Good):
    @dataclass(frozen=True, kw_only=True)
    class Config(Good.Config):
        kept: int = 1

        def to_dict(self):
            return {"operator": self.owner.name, "init": self.init}


class WritesAnotherName(Good):
    @dataclass(frozen=True, kw_only=True)
    class Config(Good.Config):
        def to_dict(self):
            return {**super().to_dict(), "operator": "self_attention"}


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
        return (
            query.square().square().exp().sqrt()
            - query.square().square().exp().sqrt()
            + super().forward(query, key, value, context)
        )


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


class IdleEverywhere(DeadParameter):
    idle_parameters = ("gate",)


class DeadOnSmallGrids(Good):
    """Nothing declares that the gate has nothing to do on the first grid."""

    def forward(self, query, key, value, context):
        gate = self.gate if query.shape[2] > 64 else self.gate.detach()
        return F.scaled_dot_product_attention(query, key, value) * gate


class MixesRows(Good):
    def forward(self, query, key, value, context):
        return super().forward(query, key, value - value.mean(0, keepdim=True), context)


class Counts(Good):
    calls = 0

    def forward(self, query, key, value, context):
        self.calls += 1
        return super().forward(query, key, value, context) * (1 + 0.01 * self.calls)


class OtherwiseWithoutGradients(Good):
    def forward(self, query, key, value, context):
        mixed = super().forward(query, key, value, context)
        return mixed if torch.is_grad_enabled() else mixed.to(torch.float32).to(mixed.dtype)


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


class OtherwiseCompiled(Good):
    def forward(self, query, key, value, context):
        mixed = super().forward(query, key, value, context)
        return (
            mixed.float().to(mixed.dtype) if torch.compiler.is_compiling() and not torch.is_grad_enabled() else mixed
        )


class WrongFastPath(Good):
    def reference(self, query, key, value, context):
        return self(query, key, 1.01 * value, context)


class IgnoresMask(Good):
    honours_mask = True


class MasksByTheFirstQuery(Good):
    honours_mask = True

    def forward(self, query, key, value, context):
        mask = None if context.mask is None else context.mask[:, :, -1:]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask) * self.gate


class LeavesOthersOut(Good):
    honours_others = True

    def forward(self, query, key, value, context):
        tokens = query.shape[2]
        return super().forward(query, key[:, :, :tokens], value[:, :, :tokens], context)


class AddsOthersUp(Good):
    honours_others = True

    def forward(self, query, key, value, context):
        tokens, hidden = query.shape[2], context.mask is not None
        own, others = ((key[:, :, some], value[:, :, some]) for some in (slice(tokens), slice(tokens, None)))
        mixed = super().forward(query, *own, context)
        return mixed if hidden or not others[0].shape[2] else (mixed + super().forward(query, *others, context)) / 2


class RefusesItsMask(Good):
    honours_mask = True

    def forward(self, query, key, value, context):
        if context.mask is not None:
            raise OperatorError("no masks here")
        return super().forward(query, key, value, context)


class KeepsInferenceTensors(Good):
    factor = None

    def forward(self, query, key, value, context):
        if self.factor is None:
            self.factor = torch.full((1,), 2.0, dtype=value.dtype)
        return super().forward(query, key, value, context) * self.factor


class PreciseOnly(Good):
    def forward(self, query, key, value, context):
        mixed = super().forward(query, key, value, context)
        return mixed.detach() if value.dtype == torch.bfloat16 else mixed


class RefusesEveryGrid(Good):
    def forward(self, query, key, value, context):
        raise GeometryError("never")


class CrashesOnOddGrids(Good):
    def forward(self, query, key, value, context):
        return super().forward(query, key, value, context).view(*query.shape[:2], 8, -1).reshape(query.shape)


class FractionalFlops(Good):
    def flops(self, tokens):
        return super().flops(tokens) / 1


class SaysCausal(Good):
    causal_operator = True


class RowMeanSaysCausal(Good):
    """Looks ahead, but never beyond its row."""

    needs_grid = causal_operator = True

    def forward(self, query, key, value, context):
        grid = context.require_grid(self.name, value.shape[2])
        rows = value.unflatten(2, (grid.height, grid.width))
        return rows.mean(3, keepdim=True).expand_as(rows).flatten(2, 3) * self.gate


class SaysNothingOfCausal(Good):
    def forward(self, query, key, value, context):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True) * self.gate


class LooksAheadAnyway(Good):
    honours_causal = True


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


class ClaimsTooMuch(Good):
    def receptive_field(self, token, grid):
        return range(grid.tokens + 1)


class Uncheckpointable(Good):
    """Computes something else when it is run again within the backward pass."""

    runs = 0

    def forward(self, query, key, value, context):
        self.runs += 1
        return super().forward(query * (2.0 if self.runs == 3 else 1.0), key, value, context)


class NeedsHeadsFirst(Good):
    """Runs on tensors as `torch.randn` makes them, and in no model."""

    def forward(self, query, key, value, context):
        heads = [part.view(-1, *part.shape[2:]) for part in (query, key, value)]
        return F.scaled_dot_product_attention(*heads).view(query.shape) * self.gate


class WarmStartOfNan(Good):
    @torch.no_grad()
    def init_from(self, original):
        self.gate.fill_(float("nan"))


class UnseededWarmStart(Good):
    @torch.no_grad()
    def init_from(self, original):
        self.gate.copy_(torch.randn(self.gate.shape, generator=torch.Generator().manual_seed(torch.seed() % 2**31)))


class CrashesAsItStarts(Good):
    def init_from(self, original):
        self.gate.data = original.no_such_layer.weight


class ThreeHeads(Good):
    def forward(self, query, key, value, context):
        mixed = super().forward(query, key, value, context)
        return mixed.view(query.shape[0], 3, query.shape[2], query.shape[3])


class WidthOfTheExample(FeedForwardOperator):
    def __init__(self, config, site):
        super().__init__(config, site)
        self.line = nn.Linear(site.width, 12)

    def forward(self, hidden_states, context):
        return self.line(hidden_states)

    def flops(self, tokens):
        return 2 * tokens * self.site.width * 12


class CachesByTokens(Mixer):
    needs_grid = True
    unused_inputs = ("input 0", "input 1")

    def __init__(self, config, site):
        super().__init__(config, site)
        self.gate = nn.Parameter(torch.ones(site.head_width))
        self.sides = {}

    def forward(self, query, key, value, context):
        grid = context.require_grid(self.name, value.shape[2])
        sides = self.sides.setdefault(value.shape[2], (grid.frames * grid.height, grid.width))
        columns = value.unflatten(2, sides)
        return (0 * columns + columns.mean(2, keepdim=True)).flatten(2, 3) * self.gate


class CrashesOnVideos(Good):
    needs_grid = True

    def forward(self, query, key, value, context):
        grid = context.require_grid(self.name, value.shape[2])
        value = value.unflatten(2, (grid.height, grid.width)).flatten(2, 3)
        return super().forward(query, key, value, context)


class FlopsOfOneSize(Good):
    def flops(self, tokens):
        return 256 * tokens * self.site.inner_width


class FlopsOfOneWidth(Good):
    def flops(self, tokens):
        return 4 * tokens**2 * 12


class DropsInTraining(Good):
    def forward(self, query, key, value, context):
        return F.dropout(super().forward(query, key, value, context), 0.1, self.training)


class Masked(Good):
    honours_mask = True

    def mask_of(self, context):
        return context.mask

    def forward(self, query, key, value, context):
        mask = None if context.mask is None else self.mask_of(context)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=context.scale) * self.gate


class ZerosUnderMask(Masked):
    def forward(self, query, key, value, context):
        return torch.zeros_like(query) if context.mask is not None else super().forward(query, key, value, context)


class HidesNegativeBiases(Masked):
    def mask_of(self, context):
        return context.mask if context.mask.dtype == torch.bool else context.mask >= 0


class ForgetsBias(Masked):
    def mask_of(self, context):
        return context.mask if context.mask.dtype == torch.bool else context.mask > -1000


class IgnoresScale(Good):
    def forward(self, query, key, value, context):
        return F.scaled_dot_product_attention(query, key, value) * self.gate


class SquaresScale(Good):
    def forward(self, query, key, value, context):
        scale = query.shape[-1] ** -0.5 if context.scale is None else context.scale**2
        return F.scaled_dot_product_attention(query, key, value, scale=scale) * self.gate


class Gated(Good):
    needs_hidden_states = True

    def forward(self, query, key, value, context):
        gate = context.hidden_states.mean(-1).sigmoid()
        return super().forward(query, key, value, context) * gate[:, None, :, None]


class ReadsUnasked(Gated):
    needs_hidden_states = False


class ClaimsHiddenStates(Good):
    needs_hidden_states = True


class BeforeRotary(Good):
    before_rotary = True

    def forward(self, query, key, value, context):
        unrotated_query, unrotated_key = context.unrotated
        return super().forward(query + unrotated_query, key + unrotated_key, value, context)


class ClaimsUnrotated(Good):
    before_rotary = True


class ChoosesBeyondItsField(Good):
    chooses_tokens = True

    def receptive_field(self, token, grid):
        return {token}


class OneTokenSeesMore(FeedForwardOperator):
    def __init__(self, config, site):
        super().__init__(config, site)
        self.line = nn.Linear(site.width, site.width)

    def forward(self, hidden_states, context):
        eleventh = torch.arange(hidden_states.shape[1])[:, None] == 11
        return self.line(hidden_states + eleventh * hidden_states[:, :1])

    def flops(self, tokens):
        return 2 * tokens * self.site.width**2


class TwoLayers(FeedForwardOperator):
    output_layer = "first"

    def __init__(self, config, site):
        super().__init__(config, site)
        self.first = nn.Linear(site.width, site.width)
        self.second = nn.Linear(site.width, site.width)

    def forward(self, hidden_states, context):
        return self.second(self.first(hidden_states))

    def flops(self, tokens):
        return 4 * tokens * self.site.width**2


class NoSuchLayer(TwoLayers):
    output_layer = "third"


class AddsToItsOutputLayer(TwoLayers):
    output_layer = "second"

    def forward(self, hidden_states, context):
        return super().forward(hidden_states, context) + hidden_states


BAD = {
    "warm_start": [WarmStartOfNan, UnseededWarmStart],
    "site_shapes": [ThreeHeads, WidthOfTheExample],
    "one_instance_on_grids": [CachesByTokens],
    "training_mode": [DropsInTraining],
    "mask_bias": [ZerosUnderMask, HidesNegativeBiases, ForgetsBias],
    "scale": [IgnoresScale, SquaresScale],
    "output_layer": [TwoLayers, NoSuchLayer, AddsToItsOutputLayer],
    "config_round_trip": [ForgetsSetting, WritesAnotherName],
    "shape_and_dtype": [WrongShape, WrongDtype],
    "bfloat16_close": [Imprecise],
    "finite_on_large_inputs": [Overflows],
    "every_grid": [EightByEight],
    "needs_grid": [HidesItsGrid, ClaimsAGrid],
    "gradients_reach_everything": [
        DeadParameter,
        IdleEverywhere,
        DeadOnSmallGrids,
        PreciseOnly,
        ClaimsHiddenStates,
        ClaimsUnrotated,
    ],
    "batch_rows_independent": [MixesRows],
    "deterministic": [Counts],
    "same_without_gradients": [OtherwiseWithoutGradients],
    "leaves_inputs_alone": [ChangesInputs],
    "leaves_generators_alone": [DrawsNumbers],
    "same_seed_same_start": [OwnDice],
    "state_dict_round_trip": [UnsavedState],
    "builds_on_meta": [PinnedDevice],
    "compiles": [BreaksTheGraph, OtherwiseCompiled],
    "checkpointing": [Uncheckpointable],
    "agrees_with_reference": [WrongFastPath],
    "trains_after_inference": [KeepsInferenceTensors],
    "honours_mask": [IgnoresMask, MasksByTheFirstQuery],
    "honours_others": [LeavesOthersOut, AddsOthersUp],
    "sees_ahead": [SaysCausal, RowMeanSaysCausal, SaysNothingOfCausal, LooksAheadAnyway],
    "receptive_field": [MixingFeedForward, ClaimsTooMuch, OneTokenSeesMore, ChoosesBeyondItsField],
    "flops": [Understates, FractionalFlops, FlopsOfOneSize, FlopsOfOneWidth],
}


def subject_of(operator):
    kind = operator.kinds[0]
    return Subject(operator.Config(), conformance.example_site(kind))


PAIRS = [(check, operator) for check, bad in BAD.items() for operator in bad]


@pytest.mark.parametrize(("check", "operator"), PAIRS, ids=lambda item: getattr(item, "__name__", item))
def test_check_catches(check, operator):
    with pytest.raises(conformance.ConformanceError, match=f"^{check}: "), conformance._named(check):
        getattr(_checks, f"check_{check}")(subject_of(operator))


NEW = ["warm_start", "site_shapes", "one_instance_on_grids", "training_mode", "mask_bias", "scale", "output_layer"]


@pytest.mark.parametrize("check", NEW)
def test_the_suite_reports_a_failing_check_under_its_name(check):
    with pytest.raises(conformance.ConformanceError, match=f"^{check}: "):
        check_operator(BAD[check][0].Config())


def test_an_operator_whose_mask_is_a_bias_passes():
    assert "mask_bias" in check_operator(Masked.Config()).passed


@pytest.mark.parametrize("operator", [Gated, BeforeRotary])
def test_an_operator_that_declares_what_it_reads_besides_passes(operator):
    assert "gradients_reach_everything" in check_operator(operator.Config()).passed


def test_every_check_is_tested():
    assert set(BAD) == {check.__name__.removeprefix("check_") for check in _checks.CHECKS}


def test_a_good_operator_passes_the_same_checks_before_it_is_registered():
    assert "good" not in available()
    assert len(check_operator(Good.Config()).passed) >= 18


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (RefusesEveryGrid, "^every_grid: it refuses 8 x 8, 9 x 13, 25 x 23, 3 x 5 x 7; the last of them so: never"),
        (CrashesOnOddGrids, "^every_grid: RuntimeError: "),
        (CrashesOnVideos, "^every_grid: RuntimeError: "),
        (ReadsUnasked, "^every_grid: AttributeError: "),
        (CrashesAsItStarts, "^warm_start: AttributeError: "),
        (RefusesItsMask, "^honours_mask: OperatorError: no masks here"),
        (WrongShape, "^shape_and_dtype: "),
        (NeedsHeadsFirst, "^shape_and_dtype: RuntimeError: view size is not compatible"),
        (FractionalFlops, "^flops: "),
    ],
)
def test_whatever_goes_wrong_is_named(operator, message):
    with pytest.raises(conformance.ConformanceError, match=message):
        check_operator(operator.Config())


def test_what_cannot_be_built_is_refused_as_anywhere():
    for kind in ("feed_forward", "attention"):
        with pytest.raises(OperatorError, match=f"good replaces self_attention, and was to be checked on '{kind}'"):
            check_operator(Good.Config(), kind=kind)


def test_an_operator_without_kinds_is_told_so():
    class OfNoKind(Good):
        kinds = ()

    with pytest.raises(OperatorError, match="declares no kinds of site"):
        check_operator(OfNoKind.Config())


def test_a_report_is_a_table_of_promises():
    lines = str(check_operator("self_attention")).splitlines()
    assert lines[0].startswith("self_attention() passed ")
    assert any(line.split(maxsplit=1) == ["deterministic", "Equal inputs give equal outputs."] for line in lines)


def test_context_without_grid_is_refused_in_words():
    with pytest.raises(GeometryError, match="gave no grid"):
        Context().require_grid("x", 4)
