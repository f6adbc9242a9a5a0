"""Whole attentions and feed-forwards in every family: in, run, learn, saved, back, and out without a trace."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import GraftError, OperatorError
from diffusers_graft.inspection import projections

from ..inspection.models import predict
from .families import FEED_FORWARD, NAMES, NO_SOFTMAX, learn_and_share, model_of, run_grafted, same

NO_FEED_FORWARD = {
    "MiniMaxMusic3Transformer1DModel": "linear layers inline in the block",
    "PRXTransformer2DModel": "linear layers inline",
    "MiniMaxMusic3RVQDepthDecoder": "linear layers inline",
    "RFD4ProteinaTransformer": "its transition takes the conditions too",
    "T5FilmDecoder": "it scales and shifts inside",
}


WHOLE = (
    "SanaTransformer2DModel",
    "SanaVideoTransformer3DModel",
    "WanTransformer3DModel",
    "PixArtTransformer2DModel",
    "HunyuanDiT2DModel",
    "CosmosTransformer3DModel",
)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_attentions_are_replaced_also_where_there_is_no_softmax(name, tmp_path):
    model = model_of(name)
    before, keys = predict(model, name), list(model.state_dict())
    model.set_graft({"self_attention[:]": "gated_deltanet"})
    assert not torch.equal(predict(model, name), before)
    learn_and_share(model, name, tmp_path)
    model.unset_graft()
    same(model, keys, before)


def test_whole_attentions_are_refused_where_text_shares_the_stream():
    model = model_of("FluxTransformer2DModel")
    with pytest.raises(OperatorError):
        run_grafted(model, {"self_attention[0]": {"operator": "gated_deltanet", "init": "random"}})
    model.unset_graft()
    with pytest.raises(OperatorError, match="replaces self_attention"):
        model.set_graft({"joint_attention[0]": "gated_deltanet"})


def test_models_that_look_at_processors_find_them_beside_whole_attentions():
    name = "AceStepTransformer1DModel"
    if name not in NAMES:
        pytest.skip(f"this diffusers has no {name}")
    model = model_of(name)
    model.set_graft({"self_attention[0]": {"operator": "gated_deltanet", "init": "random"}})
    assert predict(model, name).isfinite().all()


def test_whole_attentions_refuse_masks_by_any_name():
    name = "RFD4ProteinaTransformer"
    if name not in NAMES:
        pytest.skip(f"this diffusers has no {name}")
    model = model_of(name)
    model.set_graft({"self_attention[0]": {"operator": "gated_deltanet", "init": "random"}})
    attention, site = model.get_submodule(model.graft.plan.edits[0].site.path), model.graft.plan.edits[0].site
    tokens, shown = torch.randn(1, 4, site.width), torch.ones(1, 4, dtype=torch.bool)
    attention(tokens, None, shown)
    with pytest.raises(GraftError, match="cannot honour an attention mask"):
        attention(tokens, None, torch.tensor([[True, True, False, True]]))


@pytest.mark.parametrize("operator", ["mamba2", "gated_deltanet", "mamba2(bidirectional=False, scan='zigzag')"])
def test_whole_attentions_that_look_ahead_take_no_causal_place(operator):
    name = "MiniMaxMusic3RVQDepthDecoder"
    if name not in NAMES:
        pytest.skip(f"this diffusers has no {name}")
    with pytest.raises(OperatorError, match="looks ahead, and layers.0.attn is causal"):
        model_of(name).set_graft(f"self_attention[0]={operator}")


def test_whole_attentions_drop_no_bias_of_pairs():
    name = "RFD4ProteinaTransformer"
    if name not in NAMES:
        pytest.skip(f"this diffusers has no {name}")
    model = model_of(name)
    model.set_graft({"self_attention[0]": "mamba2"})
    with pytest.raises(OperatorError, match="takes a bias of pairs of tokens .pairs., which mamba2 would drop"):
        predict(model, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "Lumina2Transformer2DModel",
            "The projections of layers.1.attn differ in width .query 32, key 16, value 16, out 32.",
        ),
        ("Flux2Transformer2DModel", "attn has no plain linear layer for key"),
    ],
)
def test_whole_attentions_start_from_four_layers_of_one_width(name, words):
    with pytest.raises(OperatorError, match=words):
        model_of(name).set_graft({"self_attention[-1]": "gated_deltanet"})


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (
            "mlp",
            "the activation of joint_transformer_blocks.0.ff .AuraFlowFeedForward. is not known. Name one of geglu-approximate, gelu",
        ),
        (
            "linear_mlp",
            "Nothing can start from joint_transformer_blocks.0.ff: with AuraFlowFeedForward it is not down",
        ),
    ],
)
def test_a_feed_forward_that_nothing_can_start_from_is_named(operator, words):
    with pytest.raises(OperatorError, match=words):
        model_of("AuraFlowTransformer2DModel").set_graft({"feed_forward[0]": operator})


def test_whole_attentions_mix_one_sequence():
    name = "SanaWMLTX2RefinerTransformer3DModel"
    if name not in NAMES:
        pytest.skip(f"this diffusers has no {name}")
    path = "transformer_blocks.0.audio_to_video_attn"
    with pytest.raises(
        OperatorError, match=r"tokens of several widths .query 16, key 8, value 8.: it mixes two sequences"
    ):
        projections(model_of(name).get_submodule(path), path)


def test_an_output_projection_need_not_stand_in_a_list():
    name = "MiniMaxMusic3RVQDepthDecoder"
    if name not in NAMES:
        pytest.skip(f"this diffusers has no {name}")
    model = model_of(name)
    model.set_graft({"self_attention[0]": {"operator": "gated_deltanet", "bidirectional": False}})
    graft, original = model.graft.operators()["layers.0.attn"], model.graft.originals["layers.0.attn"]
    assert torch.equal(graft.o_proj.weight, original.to_out.weight)


@pytest.mark.parametrize("name", NAMES)
def test_feed_forwards_go_in_run_learn_and_come_out(name, tmp_path):
    model = model_of(name)
    sites = dg.find_sites(model).where(kind="feed_forward")
    assert bool(sites) != (name in NO_FEED_FORWARD)
    if not sites:
        return
    before, keys = predict(model, name), list(model.state_dict())
    model.set_graft({"feed_forward[:]": FEED_FORWARD})
    assert not torch.equal(predict(model, name), before)
    learn_and_share(model, name, tmp_path, trains=name not in NO_SOFTMAX)
    model.unset_graft()
    same(model, keys, before)


@pytest.mark.parametrize(
    ("name", "skipped"), [("FluxTransformer2DModel", True), ("AuraFlowTransformer2DModel", False)]
)
def test_hooks_that_skip_feed_forwards_find_a_seat_where_they_find_the_original(name, skipped):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    for rules in (None, {"feed_forward[:]": FEED_FORWARD}):
        model = model_of(name)
        if rules:
            model.set_graft(rules)
        output = predict(model, name)
        blocks = "transformer_blocks" if skipped else "joint_transformer_blocks"
        apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=blocks, skip_attention=False, skip_ff=True))
        assert torch.equal(predict(model, name), output) != skipped
