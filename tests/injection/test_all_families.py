"""Every transformer class of diffusers under grafts: in, run, learn, out to a folder, back, and gone without a trace."""

import copy
import functools

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import GraftError, OperatorError
from diffusers_graft.injection.attention_processor import _rotate
from diffusers_graft.inspection import family_of

from ..inspection.models import exported, first, inputs_of, predict, tiny

MIXERS = {
    "sliding_window": {"operator": "sliding_window", "window": (1, 1)},
    "linear_attention": "linear_attention",
    "hyena_x": "hyena_x",
}
NO_MODEL = {"DualTransformer2DModel": "it is no ModelMixin: graft the two Transformer2DModel in its `transformers`"}
NO_SOFTMAX = {
    "AnyFlowFARTransformer3DModel": "its self-attention runs under a flex BlockMask",
    "Kandinsky6SRTransformer3DModel": "its self-attention runs under a flex BlockMask",
}
LINEAR = {
    "SanaTransformer2DModel": "its self-attention is a linear one: the control is its own kernel",
    "SanaVideoTransformer3DModel": "the same, under rotary embeddings that follow the kernel",
}
NO_MAIN_SITE = {"SanaWMTransformer3DModel": "its self-attention is its own module without a processor"}
REFUSED = {
    ("RFD4ProteinaTransformer", "linear_attention"): "it adds a bias of pairs to the scores",
    ("RFD4ProteinaTransformer", "hyena_x"): "it adds a bias of pairs to the scores",
    ("MiniMaxMusic3RVQDepthDecoder", "sliding_window"): "it is causal, and this window looks ahead",
    ("MiniMaxMusic3RVQDepthDecoder", "linear_attention"): "it is causal, and linear attention looks ahead",
}
CLOSE = {"T5FilmDecoder": "its processor multiplies the scores itself, softmax attention by torch rounds otherwise"}
NO_FEED_FORWARD = {
    "MiniMaxMusic3Transformer1DModel": "linear layers inline in the block",
    "PRXTransformer2DModel": "linear layers inline",
    "MiniMaxMusic3RVQDepthDecoder": "linear layers inline",
    "RFD4ProteinaTransformer": "its transition takes the conditions too",
    "T5FilmDecoder": "it scales and shifts inside",
}
NAMES = sorted(set(exported()) - set(NO_MODEL))


@functools.cache
def built(name):
    return tiny(name)


def model_of(name):
    return copy.deepcopy(built(name))


def main_sites(model):
    """The self- and joint-attention that runs on the image, and in this forward."""
    aside, called = family_of(model).aside, set()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        for path, module in model.named_modules()
    ]
    predict(model, type(model).__name__)
    for handle in handles:
        handle.remove()
    kinds = ("joint_attention", "self_attention")
    found = [site for site in dg.find_sites(model) if site.kind in kinds and site.path in called]
    return [site for site in found if not site.path.startswith(aside)] if aside else found


def rules_for(model, spec):
    return {site.address: spec for site in main_sites(model)}


def run_grafted(model, rules):
    model.set_graft(rules)
    return predict(model, type(model).__name__)


def same(model, keys, output):
    assert list(model.state_dict()) == keys
    assert torch.equal(predict(model, type(model).__name__), output)


@pytest.mark.parametrize("name", NAMES)
def test_reference_softmax_changes_not_a_bit(name):
    model = model_of(name)
    before, keys = predict(model, name), list(model.state_dict())
    if name in NO_MAIN_SITE:
        assert not main_sites(model)
        return
    if name in NO_SOFTMAX:
        rules = rules_for(model, "self_attention")
        with pytest.raises(OperatorError):
            run_grafted(model, rules)
        return
    model.set_graft(rules_for(model, "self_attention"))
    if name in LINEAR:
        assert not torch.equal(predict(model, name), before)
    elif name in CLOSE:
        torch.testing.assert_close(predict(model, name), before)
    else:
        same(model, keys, before)
    model.unset_graft()
    same(model, keys, before)


@pytest.mark.parametrize("name", LINEAR)
def test_where_attention_is_linear_its_own_kernel_is_the_control(name):
    """Queries, keys and values are those that the original multiplies: its kernel, by our operator, is the original."""
    model = model_of(name)
    if (
        name == "SanaVideoTransformer3DModel"
    ):  # turned after the kernel there, before it here: the same where nothing is turned
        model.rope.freqs_cos.fill_(1)
        model.rope.freqs_sin.fill_(0)
    before = predict(model, name)
    model.set_graft(rules_for(model, {"operator": "linear_attention", "feature_map": "relu"}))
    assert (predict(model, name) - before).norm() < 5e-3 * before.norm()  # our sums begin at 0.001, so none is empty
    model.unset_graft()
    assert torch.equal(predict(model, name), before)


def test_rotary_embeddings_are_turned_as_the_linear_attention_turns_them():
    from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

    tokens = torch.randn(2, 7, 3, 8)
    cosines, sines = get_1d_rotary_pos_embed(8, 7, use_real=True, repeat_interleave_real=True)
    expected = apply_rotary_emb(tokens.transpose(1, 2), (cosines, sines)).transpose(1, 2)
    torch.testing.assert_close(_rotate(tokens, cosines[None, :, None], sines[None, :, None]), expected)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(NO_SOFTMAX) - set(NO_MAIN_SITE)))
def test_mixers_go_in_run_learn_and_come_out(name, mixer, tmp_path):
    model = model_of(name)
    before, keys, rules = predict(model, name), list(model.state_dict()), rules_for(model, MIXERS[mixer])
    model.set_graft(rules)
    if (name, mixer) in REFUSED:
        with pytest.raises(GraftError):
            predict(model, name)
    else:
        assert not torch.equal(predict(model, name), before)
        learn_and_share(model, name, tmp_path)
    model.unset_graft()
    same(model, keys, before)


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
    site = next(site for site in dg.find_sites(model_of(name)) if site.path.endswith("audio_to_video_attn"))
    with pytest.raises(
        OperatorError, match=r"tokens of several widths .query 16, key 8, value 8.: it mixes two sequences"
    ):
        model_of(name).set_graft({site.address: "gated_deltanet"})


def test_an_output_projection_need_not_stand_in_a_list():
    name = "MiniMaxMusic3RVQDepthDecoder"
    if name not in NAMES:
        pytest.skip(f"this diffusers has no {name}")
    model = model_of(name)
    model.set_graft({"self_attention[0]": {"operator": "gated_deltanet", "bidirectional": False}})
    graft, original = model.graft.operators()["layers.0.attn"], model.graft.originals["layers.0.attn"]
    assert torch.equal(graft.o_proj.weight, original.to_out.weight)


FEED_FORWARD = {"operator": "mlp", "init": "random", "activation": "gelu", "expansion": 1}


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


def learn_and_share(model, name, folder, *, trains=True):
    one_step(model, inputs_of(name), trains=trains)
    same_after_a_round(model, model_of(name), folder, lambda model: predict(model, name))


def one_step(model, inputs, *, trains=True):
    own = list(model.graft.tensors(model).values())
    trained = [parameter for parameter in own if parameter.requires_grad] or [
        parameter for seat in model.graft.seats.values() for parameter in seat.parameters() if parameter.requires_grad
    ]
    if trains:
        first(model(**inputs)).square().mean().backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
        with torch.no_grad():
            for parameter in own:
                if parameter.requires_grad and parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        model.zero_grad()


def same_after_a_round(model, other, folder, predict):
    """Through a folder to another copy of the base."""
    grafted = predict(model)
    assert grafted.isfinite().all()
    model.save_graft(folder)
    other.load_graft(folder)
    assert torch.equal(predict(other), grafted)
