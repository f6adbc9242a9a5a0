"""Generated processors in every family: same bits under softmax, masks, precisions, backends."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import diffusers_graft as dg
from diffusers_graft.errors import GeometryError, GraftError, OperatorError, StateError
from diffusers_graft.injection.attention_processor import _intercept_call, _rotate, grafted_class, is_grafted
from diffusers_graft.inspection import example_inputs

from ..inspection.models import exported, first, inputs_of, tiny
from ..inspection.models import predict as predict_in_zoo
from ..models import predict, tiny_dit, tiny_pixart
from .families import (
    LINEAR,
    MIXERS,
    NAMES,
    NO_MAIN_SITE,
    NO_SOFTMAX,
    learn_and_share,
    main_sites,
    model_of,
    rules_for,
    run_grafted,
    same,
)
from .flux import FLUX, RULES, expected, grafted

REFUSED = {
    ("RFD4ProteinaTransformer", "linear_attention"): "it adds a bias of pairs to the scores",
    ("RFD4ProteinaTransformer", "hyena_x"): "it adds a bias of pairs to the scores",
    ("MiniMaxMusic3RVQDepthDecoder", "sliding_window"): "it is causal, and this window looks ahead",
    ("MiniMaxMusic3RVQDepthDecoder", "linear_attention"): "it is causal, and linear attention looks ahead",
}


CLOSE = {"T5FilmDecoder": "its processor multiplies the scores itself, softmax attention by torch rounds otherwise"}


@pytest.mark.parametrize("name", NAMES)
def test_reference_softmax_changes_not_a_bit(name):
    model = model_of(name)
    before, keys = predict_in_zoo(model, name), list(model.state_dict())
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
        assert not torch.equal(predict_in_zoo(model, name), before)
    elif name in CLOSE:
        torch.testing.assert_close(predict_in_zoo(model, name), before)
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
    before = predict_in_zoo(model, name)
    model.set_graft(rules_for(model, {"operator": "linear_attention", "feature_map": "relu"}))
    assert (
        predict_in_zoo(model, name) - before
    ).norm() < 5e-3 * before.norm()  # our sums begin at 0.001, so none is empty
    model.unset_graft()
    assert torch.equal(predict_in_zoo(model, name), before)


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
    before, keys, rules = predict_in_zoo(model, name), list(model.state_dict()), rules_for(model, MIXERS[mixer])
    model.set_graft(rules)
    if (name, mixer) in REFUSED:
        with pytest.raises(GraftError):
            predict_in_zoo(model, name)
    else:
        assert not torch.equal(predict_in_zoo(model, name), before)
        learn_and_share(model, name, tmp_path)
    model.unset_graft()
    same(model, keys, before)


def test_other_attention_is_untouched_by_masks():
    """PixArt pads its prompts: the mask reaches a cross-attention graft."""

    model = tiny_pixart()
    inputs = example_inputs(model, batch_size=2)
    inputs["encoder_attention_mask"][:, 5:] = 0
    before = model(**inputs).sample
    model.set_graft({"cross_attention[:]": "self_attention"})
    assert torch.equal(model(**inputs).sample, before)
    model.unset_graft()
    model.set_graft({"cross_attention[:]": "linear_attention"})
    masked = model(**inputs).sample
    inputs["encoder_hidden_states"][:, 5:] += 7
    assert torch.equal(model(**inputs).sample, masked)


def test_a_mask_that_hides_is_refused_by_operators_that_cannot_honour_it():

    model = tiny_pixart()
    model.set_graft({"self_attention[:]": "hyena_x"})
    mask = torch.ones(1, 16)
    model(**example_inputs(model), attention_mask=mask)
    with pytest.raises(GeometryError, match="cannot honour an attention mask"):
        model(**example_inputs(model), attention_mask=mask.tril(12))


def test_lost_processors_are_noticed_at_the_next_forward_and_save(tmp_path):
    model = tiny_pixart()
    model.set_graft({"self_attention[1]": "hyena_x"})
    model.fuse_qkv_projections()
    with pytest.raises(StateError, match="was lost: its processor is now FusedAttnProcessor2_0"):
        predict(model)
    with pytest.raises(StateError, match="was lost"):
        model.save_graft(tmp_path)


def test_without_source_the_softmax_is_caught_on_its_way(monkeypatch):
    model = tiny_pixart()
    before = predict(model)
    original = type(model.transformer_blocks[0].attn1.processor)
    cls = grafted_class(original)
    monkeypatch.setattr(cls, "__call__", _intercept_call(original))
    model.set_graft({"self_attention[:]": "self_attention", "cross_attention[:]": "self_attention"})
    assert torch.equal(predict(model), before)
    model.unset_graft()
    model.set_graft({"self_attention[:]": "neighborhood"})
    assert not torch.equal(predict(model), before)


def test_without_source_a_softmax_that_is_not_caught_is_no_graft(monkeypatch):
    model = tiny_dit()
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())  # multiplies scores itself
    monkeypatch.setattr(grafted_class(AttnProcessor), "__call__", _intercept_call(AttnProcessor))
    model.set_graft({"self_attention[0]": "neighborhood"})
    with pytest.raises(OperatorError, match="never called scaled_dot_product_attention"):
        predict(model)


def test_what_a_processor_was_told_stays():
    model = tiny_dit()
    model.transformer_blocks[0].attn1.processor.told = 7
    model.set_graft({"self_attention[0]": "hyena_x"})
    assert model.transformer_blocks[0].attn1.processor.told == 7


def test_one_generated_class_for_each_processor_class():
    model = tiny_dit()
    model.set_graft({"self_attention[:]": "hyena_x"})
    processors = [block.attn1.processor for block in model.transformer_blocks]
    assert len({type(processor) for processor in processors}) == 1
    assert all(map(is_grafted, processors))


def test_the_attention_backend_reaches_the_processor_below():
    model = grafted()
    try:
        model.set_attention_backend("native")
        backends = {module.processor._attention_backend for module in model.modules() if hasattr(module, "processor")}
        assert backends == {"native"}
        assert torch.equal(predict_in_zoo(model, FLUX), expected())
    finally:
        model.reset_attention_backend()


def test_context_parallelism_is_refused():
    model = tiny(FLUX)
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(OperatorError, match="disable context parallelism"):
        model.set_graft(RULES)


def test_fusing_projections_keeps_a_graft_or_is_noticed():
    model = grafted()
    model.fuse_qkv_projections()
    torch.testing.assert_close(predict_in_zoo(model, FLUX), expected())
    other = tiny("SD3Transformer2DModel")
    other.set_graft({"joint_attention[:]": "neighborhood"})
    other.fuse_qkv_projections()
    with pytest.raises(StateError, match="was lost"):
        predict_in_zoo(other, "SD3Transformer2DModel")


def test_keys_of_a_cache_are_refused():
    model = tiny("WanTransformer3DModel")
    model.set_graft({"self_attention[:]": "hyena_x"})
    attention = model.blocks[0].attn1
    query, key = torch.randn(1, 4, 2, 12), torch.randn(1, 6, 2, 12)
    with pytest.raises(OperatorError, match="Run the model without its cache"):
        attention.processor._mix_tokens_first(attention, torch.zeros(1, 4, 24), None, query, key, key)


def test_a_block_mask_is_refused():
    name = "WanAnimate2Transformer3DModel"
    if name not in exported():
        pytest.skip(f"this diffusers has no {name}")
    model = tiny(name)
    model.set_graft({"self_attention[:]": "hyena_x"})
    inputs = inputs_of(name)
    with torch.no_grad():
        model(**inputs)
    inputs |= {
        "kv_cache_mode": "cached",
        "reference_grid_sizes": inputs.pop("offset_grid_sizes"),
        "origin_len": 9,
        "origin_area": [64, 96],
    }
    with pytest.raises(OperatorError, match="runs under a flex BlockMask"):
        model(**inputs)


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "HunyuanVideoTransformer3DModel"])
@pytest.mark.parametrize("mixer", ["neighborhood", "linear_attention", "hyena_x"])
def test_padded_prompts_are_not_seen(name, mixer):
    """As in a batch for classifier-free guidance, where the empty prompt is the shorter one."""
    model = tiny(name)
    inputs = inputs_of(name)
    mask = "encoder_hidden_states_mask" if name == "QwenImageTransformer2DModel" else "encoder_attention_mask"
    inputs[mask][0, 3:] = 0
    moved = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    moved["encoder_hidden_states"][0, 3:] += 7
    with torch.no_grad():
        if not torch.allclose(first(model(**inputs)), first(model(**moved)), atol=1e-5):
            pytest.skip("the model itself sees what is padded (before diffusers 0.37)")
        model.set_graft({"joint_attention[-1]": mixer})
        one, other = first(model(**inputs)), first(model(**moved))
    assert one.isfinite().all()
    torch.testing.assert_close(one, other)


PADDED, SHOWN = "AllegroTransformer3DModel", 8  # its latents come with a mask; the columns that it shows


@torch.no_grad()
def by_padding(model, *, hide):
    """What the model makes of the columns that a mask shows, for two contents of those that it hides."""
    outputs = []
    for content in (0, 7):
        inputs = inputs_of(PADDED)
        inputs["hidden_states"][..., SHOWN:] += content
        if hide:
            inputs["attention_mask"][..., SHOWN:] = 0
        outputs.append(first(model(**inputs))[..., :SHOWN])
    return outputs


@pytest.mark.parametrize("mixer", ["sliding_window", "neighborhood", "linear_attention"])
def test_padded_parts_of_an_image_are_not_seen(mixer):
    model = tiny(PADDED)
    model.set_graft({"self_attention[:]": mixer})
    one, other = by_padding(model, hide=True)
    assert one.isfinite().all()
    torch.testing.assert_close(one, other)
    one, other = by_padding(model, hide=False)
    assert not torch.allclose(one, other)


def test_mixers_without_a_softmax_refuse_padded_images_with_words():
    model = tiny(PADDED)
    model.set_graft({"self_attention[:]": "hyena_x"})
    with pytest.raises(GeometryError, match="choose an operator that can: linear_attention, or a window"):
        by_padding(model, hide=True)


def test_prompts_of_several_lengths_that_move_the_image_are_refused():
    name = "Lumina2Transformer2DModel"
    model = tiny(name)
    model.set_graft({"self_attention[-1]": "neighborhood"})
    inputs = inputs_of(name)
    inputs["encoder_attention_mask"][0, 3:] = False
    with pytest.raises(GeometryError, match="gave no grid|cannot honour"):
        model(**inputs)


@pytest.mark.parametrize(
    "name",
    [
        FLUX,
        "SD3Transformer2DModel",
        "WanTransformer3DModel",
        "QwenImageTransformer2DModel",
        "ZImageTransformer2DModel",
    ],
)
def test_bfloat16(name):
    def halved(value):
        if isinstance(value, list):
            return [halved(item) for item in value]
        return value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value

    model = tiny(name)
    kind = "joint_attention" if dg.find_sites(model).where(kind="joint_attention") else "self_attention"
    model.set_graft({f"{kind}[-1]": "neighborhood"})
    exact = predict_in_zoo(model, name)
    model.to(torch.bfloat16)
    with torch.no_grad():
        output = first(model(**{key: halved(value) for key, value in inputs_of(name).items()}))
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize(
    "sizes", [{"batch": 1}, {"height": 6, "width": 4}, {"batch": 4, "height": 3, "width": 8}], ids=str
)
def test_other_resolutions_and_batches(sizes):
    for name in (FLUX, "SD3Transformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel"):
        model = tiny(name)
        kind = "joint_attention" if dg.find_sites(model).where(kind="joint_attention") else "self_attention"
        model.set_graft({f"{kind}[:]": "neighborhood"})
        assert predict_in_zoo(model, name, **sizes).isfinite().all()


SKIPS = [
    {"skip_attention": True, "skip_ff": False},
    {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
]


@pytest.mark.parametrize("skips", SKIPS, ids=["attention", "scores"])
def test_hooks_that_skip_layers_know_a_processor_as_the_original_one(skips):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    outputs = []
    for operator in (None, "self_attention", "neighborhood"):
        model = tiny_dit()
        if operator is not None:
            model.set_graft({"self_attention[:]": operator})
        apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks", **skips))
        outputs.append(predict(model))
    assert torch.equal(outputs[0], outputs[1])
    assert outputs[2].isfinite().all()
    assert not torch.equal(outputs[0], predict(tiny_dit()))


def contexts_of(model, name, site, *, run=predict_in_zoo, **flags):
    """Queries, keys and contexts that the mixer of one site is given, once it declares that it needs more."""
    model.set_graft({site: "self_attention"})
    (operator,) = model.graft.operators().values()
    seen = []
    for flag in flags:
        setattr(operator, flag, True)
    operator.is_plain_softmax = True
    forward = operator.forward
    operator.forward = lambda query, key, value, context: (
        seen.append((query, key, context)) or forward(query, key, value, context)
    )
    run(model, name)
    return seen


def test_a_mixer_that_needs_hidden_states_is_given_what_the_attention_was_given():
    model, given = tiny_dit(), []
    model.transformer_blocks[1].attn1.to_q.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    ((_, _, context),) = contexts_of(
        model, None, "self_attention[1]", run=lambda model, _: predict(model), needs_hidden_states=True
    )
    assert torch.equal(context.hidden_states, given[0])


def test_a_mixer_before_rotary_embeddings_is_given_queries_and_keys_without_them():
    model, given = tiny(FLUX), []
    model.single_transformer_blocks[0].attn.norm_q.register_forward_hook(lambda *call: given.append(call[-1]))
    ((query, _, context),) = contexts_of(model, FLUX, "self_attention[0]", before_rotary=True)
    unrotated, _ = context.unrotated
    assert torch.equal(unrotated, given[0].transpose(1, 2))
    assert not torch.equal(unrotated, query)


def test_a_mixer_whose_needs_a_processor_cannot_meet_is_refused_with_words():
    with pytest.raises(OperatorError, match="before rotary embeddings, and those of .* cannot be read"):
        contexts_of(tiny_dit(), None, "self_attention[0]", run=lambda model, _: predict(model), before_rotary=True)
    with pytest.raises(OperatorError, match="needs the hidden states of all tokens it mixes"):
        contexts_of(tiny(FLUX), FLUX, "joint_attention[0]", needs_hidden_states=True)


@pytest.mark.parametrize(("site", "block"), [("joint_attention[0]", 0), ("self_attention[0]", 1)])
def test_a_mixer_beside_text_is_given_the_hidden_states_of_the_image_alone(site, block):
    model, given = tiny(FLUX), []
    blocks = [model.transformer_blocks[0], model.single_transformer_blocks[0]]
    blocks[block].attn.to_q.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model.set_graft({site: "block_sparse(block=1, keep=1, gate='token')"})
    (operator,) = model.graft.operators().values()
    contexts = []
    forward = operator.forward
    operator.forward = lambda *inputs: contexts.append(inputs[-1]) or forward(*inputs)
    predict_in_zoo(model, FLUX)
    image = contexts[0].grid.tokens
    assert contexts[0].hidden_states.shape[1] == image
    # A single stream holds text before the image, a joint attention is given the image's stream alone.
    assert torch.equal(contexts[0].hidden_states, given[0][:, -image:])


SPARSE = [
    "block_sparse(block=2, keep=1, gate='token')",
    "sparse_linear(block=2, keep=1)",
    "compressed_linear",
    "compressed_linear(text_share='tokens')",
    "neighborhood(kernel=3, shape='circle', far=2)",
    "radial(least=1, sink=False)",
]


@pytest.mark.parametrize(
    "name",
    [
        "DiTTransformer2DModel",
        "SD3Transformer2DModel",
        FLUX,
        "WanTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
    ],
)
def test_sparse_and_compressed_mixers_run_beside_text_and_learn(name):
    model = tiny(name)
    before = predict_in_zoo(model, name)
    for spec in SPARSE:
        model.set_graft(rules_for(model, spec))
        output = first(model(**inputs_of(name)))
        assert output.isfinite().all(), spec
        output.square().sum().backward()
        for operator in model.graft.operators().values():
            for parameter in operator.parameters():
                assert parameter.grad is not None, spec
                assert parameter.grad.isfinite().all(), spec
        model.unset_graft()
    assert torch.equal(predict_in_zoo(model, name), before)
