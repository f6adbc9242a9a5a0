"""Mixers that need more than queries, keys and values: each class of diffusers gives it, or is refused in words."""

import pytest
import torch

from diffusers_graft.errors import GraftError, OperatorError

from ..inspection.models import predict
from .families import NAMES, NO_MAIN_SITE, model_of, rules_for, run_grafted

GATED = {"operator": "block_sparse", "block": 2, "keep": 1, "gate": "token"}
TURNED = {"operator": "linear_attention", "feature_map": "relu", "rotary": "neighbours"}


@pytest.mark.parametrize("spec", [GATED, TURNED], ids=["hidden states", "before rotary"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(NO_MAIN_SITE)))
def test_a_need_is_met_or_refused_in_words(name, spec):
    model = model_of(name)
    try:
        output = run_grafted(model, rules_for(model, spec))
    except GraftError:
        return
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("FluxTransformer2DModel", "neighbours"),
        ("WanTransformer3DModel", "neighbours"),
        ("LTXVideoTransformer3DModel", "neighbours"),  # turned before the heads are split
        ("SanaVideoTransformer3DModel", "neighbours"),
        ("AceStepTransformer1DModel", "halves"),  # with fewer heads of keys
        ("LongCatAudioDiTTransformer", "halves"),
    ],
)
def test_features_are_taken_before_the_rotary_embedding(name, pairs):
    model = model_of(name)
    before = predict(model, name)
    output = run_grafted(model, rules_for(model, {**TURNED, "rotary": pairs}))
    assert output.isfinite().all()
    assert not torch.equal(output, before)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("FluxTransformer2DModel", "halves"),
        ("LongCatAudioDiTTransformer", "neighbours"),
        ("AllegroTransformer3DModel", "neighbours"),  # three parts of a head are turned by themselves
    ],
)
def test_pairs_that_an_embedding_does_not_turn_are_refused(name, pairs):
    model = model_of(name)
    with pytest.raises(OperatorError, match=f"rotary='{pairs}' was asked for, and the embedding of"):
        run_grafted(model, rules_for(model, {**TURNED, "rotary": pairs}))
