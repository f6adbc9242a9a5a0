"""Shares of attention near the query, against attention by hand."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.core.sites import Site
from diffusers_graft.evaluation.locality import LocalityProbe, near_tokens

from ..inspection.models import inputs_of, tiny
from ..models import SCHEDULER, batches, predict, tiny_dit


def test_near_tokens():
    band, window = near_tokens(Grid(height=3, width=3), 2, 3)
    assert band[4].tolist() == [False, False, True, True, True, True, True, False, False]
    assert window[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
    assert window[4].all()
    assert near_tokens(Grid(height=1, width=7), 0, 5)[1][3].tolist() == [False, *[True] * 5, False]


@pytest.mark.parametrize("additive", [False, True])
def test_the_probe_is_softmax_under_masks_and_scales(additive):
    site = Site(kind="self_attention", index=0, path="", width=8, heads=2, head_width=4)
    probe, (query, key, value) = LocalityProbe.Config(band=0, kernel=1).build(site), torch.randn(3, 2, 2, 9, 4)
    hidden = torch.arange(9) == 8
    mask = torch.zeros(9).masked_fill(hidden, -torch.inf) if additive else ~hidden
    mixed = probe(query, key, value, Context(grid=Grid(height=3, width=3), mask=mask.expand(9, 9), scale=0.1))
    mass = (0.1 * query @ key.transpose(-1, -2)).masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(mixed, mass @ value)
    torch.testing.assert_close(probe.masses[0].shares, mass.diagonal(dim1=-2, dim2=-1).mean(-1).expand(2, 2, 2))


def test_locality_against_attention_by_hand():
    model = tiny_dit(num_layers=1)
    seen = {}
    attention = model.transformer_blocks[0].attn1
    attention.register_forward_pre_hook(lambda m, a: seen.update(hidden=a[0]))
    before = predict(model)
    (row,) = dg.analyze(model, batches(1), noise_scheduler=SCHEDULER, band=1, kernel=3, buckets=1).localities
    query, key = (
        layer(seen["hidden"]).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (attention.to_q, attention.to_k)
    )
    mass = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    band, window = near_tokens(Grid(height=4, width=4), 1, 3)
    assert row.band[0] == pytest.approx((mass * band).sum(-1).mean((0, 2)).tolist())
    assert row.neighborhood[0] == pytest.approx((mass * window).sum(-1).mean((0, 2)).tolist())
    assert row.uniform_band == pytest.approx(46 / 256)
    assert torch.equal(predict(model), before)


def test_locality_weighs_samples_alike_and_follows_masks():
    name = "PixArtTransformer2DModel"
    model, (batch,) = tiny_dit(), batches(1, size=3)
    inputs = {"hidden_states": batch["sample"], "timestep": torch.arange(3), "class_labels": batch["class_labels"]}
    parts = [{key: value[some] for key, value in inputs.items()} for some in (slice(0, 1), slice(1, 3))]
    found, together = (dg.analyze(model, some, band=1, buckets=1).localities[0] for some in (parts, [inputs]))
    assert found.band[0] == pytest.approx(together.band[0])
    model, inputs = tiny(name), inputs_of(name)
    tokens = inputs["hidden_states"][0, 0].numel() // model.config.patch_size**2
    inputs["attention_mask"] = torch.arange(tokens).expand(len(inputs["hidden_states"]), -1) == 0
    (row, *_) = dg.analyze(model, [inputs], band=tokens, kernel=1, buckets=1).localities
    assert row.neighborhood[0] == pytest.approx([1 / tokens] * 2)  # all look at the first token


@pytest.mark.parametrize(
    ("name", "other"), [("Lumina2Transformer2DModel", "context_refiner"), ("LatteTransformer3DModel", "temporal")]
)
def test_locality_leaves_out_what_runs_on_other_tokens(name, other):
    rows = dg.analyze(tiny(name), [inputs_of(name)]).localities
    assert rows
    assert not [row for row in rows if row.path.startswith(other)]
