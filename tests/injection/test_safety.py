"""What else people do to a model: compile, copy, offload, cast, quantise, adapt. It works with a graft, or says what
to do.
"""

import copy
import functools
import pickle
import time

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import GeometryError, ModelError, OperatorError, StateError
from diffusers_graft.injection.attention_processor import grafted_class

from ..inspection.models import exported, first, inputs_of, predict, tiny

FLUX = "FluxTransformer2DModel"
RULES = {
    "joint_attention[:]": "neighborhood",
    "self_attention[:]": "hyena_x",
    "feed_forward[0]": {"operator": "mlp", "expansion": 4},
}


@functools.cache
def expected():
    return predict(grafted(), FLUX)


def grafted(rules=RULES, **settings):
    model = tiny(FLUX, **settings)
    model.set_graft(rules)
    return model


def test_a_model_of_full_size_on_meta_is_grafted_in_no_time_and_without_memory():
    with torch.device("meta"):
        model = exported()[FLUX]()
    start = time.perf_counter()
    sites = dg.find_sites(model)
    model.set_graft(
        {
            "joint_attention[:]": "neighborhood",
            "self_attention[:]": "hyena_x",
            "feed_forward[:]": {"operator": "mlp", "expansion": 4},
        }
    )
    took = time.perf_counter() - start
    assert [len(sites.where(kind=kind)) for kind in ("joint_attention", "self_attention", "feed_forward")] == [
        19,
        38,
        38,
    ]
    assert took < 2
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.graft.tensors(model).values()])


def test_copies_and_pickles():
    model = grafted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(predict(twin, FLUX), expected())


COMPILED = {
    FLUX: RULES,
    "SD3Transformer2DModel": {"joint_attention[:]": "neighborhood"},
    "WanTransformer3DModel": {"self_attention[:]": "neighborhood"},
    "QwenImageTransformer2DModel": {"joint_attention[:]": "linear_attention"},
    "LTXVideoTransformer3DModel": {"self_attention[:]": "hyena_x"},
    "HunyuanVideoTransformer3DModel": {"joint_attention[:]": "neighborhood"},
    "ZImageTransformer2DModel": {"self_attention[2:]": "neighborhood"},
    "SanaTransformer2DModel": {"self_attention[:]": "neighborhood"},
    "SanaVideoTransformer3DModel": {"self_attention[:]": "linear_attention"},
    "AllegroTransformer3DModel": {"self_attention[:]": "sliding_window"},
}


@pytest.mark.parametrize("name", sorted(set(COMPILED) & set(exported())))
def test_compiles_as_one_graph(name):
    model = tiny(name)
    model.set_graft(COMPILED[name])
    eager = predict(model, name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(first(compiled(**inputs_of(name))), eager)


def test_ten_blocks_compile_as_one():
    from torch._dynamo.testing import CompileCounter

    model = grafted({"joint_attention[:]": "neighborhood"}, num_layers=10, num_single_layers=0)
    eager = predict(model, FLUX)
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(predict(model, FLUX), eager)
    assert counter.frame_count == 1


def test_a_model_compiled_in_place_takes_a_graft():
    model = tiny(FLUX)
    model.compile(backend="eager")
    predict(model, FLUX)
    model.set_graft(RULES)
    torch.testing.assert_close(predict(model, FLUX), expected())


def test_a_compiled_wrapper_is_told_apart():
    with pytest.raises(ModelError, match="graft the model itself"):
        dg.find_sites(torch.compile(tiny(FLUX), backend="eager"))


OFFLOADS = {
    "leaf": {"offload_type": "leaf_level"},
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
}


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("before", [True, False])
def test_group_offloading(how, before):
    model, cpu = tiny(FLUX), torch.device("cpu")
    try:
        tiny(FLUX).enable_group_offload(onload_device=cpu, offload_device=cpu, **OFFLOADS[how])
    except AttributeError:
        pytest.skip("this diffusers offloads only where there is an accelerator")
    plain = predict(model, FLUX)
    if not before:
        model.set_graft(RULES)
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **OFFLOADS[how])
    if before:
        model.set_graft(RULES)
    assert torch.equal(predict(model, FLUX), expected())
    model.unset_graft()
    assert torch.equal(predict(model, FLUX), plain)


@pytest.mark.parametrize("onto", ["memory", "disk"])
def test_weights_offloaded_by_accelerate_are_refused_with_words(onto, tmp_path):
    from accelerate import cpu_offload, disk_offload

    model, cpu = tiny(FLUX), torch.device("cpu")
    if onto == "disk":
        disk_offload(model, tmp_path, execution_device=cpu)
    else:
        cpu_offload(model, execution_device=cpu)
    with pytest.raises(OperatorError, match="Graft first, then enable offloading"):
        model.set_graft(RULES)
    assert model.graft is None


def test_parts_whose_weights_accelerate_keeps_do_not_change_places():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = tiny(FLUX)
    plain = predict(model, FLUX)
    model.set_graft({"joint_attention[:]": "neighborhood", "self_attention[:]": "linear_attention"})
    output = predict(model, FLUX)
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(StateError, match="remove_all_hooks"):
        model.disable_graft()
    assert torch.equal(predict(model, FLUX), output)
    remove_hook_from_submodules(model)
    model.unset_graft()
    assert torch.equal(predict(model, FLUX), plain)


@pytest.mark.parametrize("before", [True, False])
def test_layerwise_casting_leaves_grafts_in_the_dtype_they_compute_in(before):
    model = tiny(FLUX).to(torch.bfloat16)
    if not before:
        model.set_graft(RULES)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    if before:
        model.set_graft(RULES)
    assert {parameter.dtype for name, parameter in model.named_parameters() if ".graft." in name} == {torch.bfloat16}
    inputs = {name: value.bfloat16() if torch.is_tensor(value) else value for name, value in inputs_of(FLUX).items()}
    with torch.no_grad():
        assert first(model(**inputs)).isfinite().all()


def test_layers_that_hooks_cast_are_not_copied():
    model = tiny(FLUX)
    model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    with pytest.raises(StateError, match="before you enable layerwise casting"):
        model.set_graft({"joint_attention[:]": {"operator": "neighborhood", "init": "random"}})
    graft = dg.build_graft(model, dg.plan_graft(model, {"joint_attention[:]": "neighborhood"}))
    with pytest.raises(StateError, match="Train first"):
        dg.distill(model, graft, [inputs_of(FLUX)], dg.DistillConfig(steps=1, progress=False))
    assert model.graft is None


def test_a_cache_that_was_disabled_is_no_obstacle_and_works_again_on_the_graft():
    from diffusers import PyramidAttentionBroadcastConfig

    model, calls = tiny(FLUX), []
    cache = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    model.enable_cache(cache)
    model.disable_cache()
    model.set_graft(RULES)
    assert torch.equal(predict(model, FLUX), expected())
    model.enable_cache(cache)
    model.transformer_blocks[0].attn.graft.register_forward_hook(lambda *_: calls.append(1))
    with model.cache_context("one"):
        predict(model, FLUX)
        predict(model, FLUX)
    assert len(calls) == 1


def test_layerwise_casting_skips_what_it_skips_without_a_graft():
    model = tiny("WanTransformer3DModel")
    model.set_graft({"self_attention[:]": "hyena_x"})
    assert {*model._skip_layerwise_casting_patterns} > {*type(model)._skip_layerwise_casting_patterns}


def test_parts_that_wait_are_not_stored_as_their_trained_copies_are():
    model = tiny(FLUX).to(torch.bfloat16)
    model.set_graft({"joint_attention[0]": "neighborhood"})
    model.graft.untie("transformer_blocks.0.attn")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    model.unset_graft()
    assert {parameter.dtype for parameter in model.transformer_blocks[0].attn.parameters()} == {torch.bfloat16}


def test_operators_that_accelerate_offloads_layer_by_layer_are_refused_in_the_forward():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = grafted()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(StateError, match="is offloaded layer by layer"):
        predict(model, FLUX)
    remove_hook_from_submodules(model)
    assert torch.equal(predict(model, FLUX), expected())


def test_lora_loaded_before_a_graft_stays():
    from peft import LoraConfig

    model = tiny(FLUX)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "proj"], init_lora_weights=False))
    adapted, keys = predict(model, FLUX), list(model.state_dict())
    model.set_graft({"joint_attention[:]": "self_attention", "self_attention[:]": "self_attention"})
    assert torch.equal(predict(model, FLUX), adapted)
    model.unset_graft()
    model.set_graft({"joint_attention[:]": "neighborhood", "self_attention[:]": "hyena_x"})
    assert not torch.equal(predict(model, FLUX), adapted)
    model.unset_graft()
    assert torch.equal(predict(model, FLUX), adapted)
    assert list(model.state_dict()) == keys


def test_lora_loaded_over_a_graft_is_there_without_it_too():
    from peft import LoraConfig

    model, adapted = tiny(FLUX), tiny(FLUX)
    plain, lora = predict(model, FLUX), LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.set_graft({"joint_attention[:]": "self_attention"})
    for one in (model, adapted):
        torch.manual_seed(0)
        one.add_adapter(lora)
    expected = predict(adapted, FLUX)
    for verb in (model.disable_graft, model.enable_graft):
        verb()
        assert torch.equal(predict(model, FLUX), expected)
    model.unload_lora()
    for verb in (model.disable_graft, model.enable_graft):
        verb()
        assert torch.equal(predict(model, FLUX), plain)


def test_nothing_starts_from_layers_that_carry_lora():
    from peft import LoraConfig

    model = tiny(FLUX)
    model.add_adapter(LoraConfig(r=2, target_modules=["ff.net.0.proj"], init_lora_weights=False))
    with pytest.raises(OperatorError, match="Fuse LoRA into the weights first"):
        model.set_graft({"feed_forward[:]": "mlp"})
    model.set_graft({"feed_forward[:]": {"operator": "mlp", "init": "random"}})


def test_quantised_projections_are_called_and_never_read():
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    model = tiny(FLUX)
    torchao.quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda module, path: path.endswith(("to_q", "to_k", "to_v"))
    )
    quantised = predict(model, FLUX)
    model.set_graft({"joint_attention[:]": "self_attention", "self_attention[:]": "self_attention"})
    assert torch.equal(predict(model, FLUX), quantised)
    model.unset_graft()
    model.set_graft({"joint_attention[:]": "neighborhood", "self_attention[:]": "hyena_x"})
    assert predict(model, FLUX).isfinite().all()


def test_the_attention_backend_reaches_the_processor_below():
    model = grafted()
    try:
        model.set_attention_backend("native")
        backends = {module.processor._attention_backend for module in model.modules() if hasattr(module, "processor")}
        assert backends == {"native"}
        assert torch.equal(predict(model, FLUX), expected())
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
    torch.testing.assert_close(predict(model, FLUX), expected())
    other = tiny("SD3Transformer2DModel")
    other.set_graft({"joint_attention[:]": "neighborhood"})
    other.fuse_qkv_projections()
    with pytest.raises(StateError, match="was lost"):
        predict(other, "SD3Transformer2DModel")


def test_keys_of_a_cache_are_refused():
    model = tiny("WanTransformer3DModel")
    model.set_graft({"self_attention[:]": "hyena_x"})
    attention = model.blocks[0].attn1
    query, key = torch.randn(1, 4, 2, 12), torch.randn(1, 6, 2, 12)
    with pytest.raises(OperatorError, match="Run the model without its cache"):
        attention.processor._mix_tokens_first(attention, torch.zeros(1, 4, 24), None, query, key, key)


class Linear:
    """A linear attention that nobody has read yet."""

    def __call__(self, attn, hidden_states):
        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)
        mixed = query.relu() @ (key.relu().transpose(1, 2) @ value)
        return attn.to_out[0](mixed)


class WithItsOwnConvolution(Linear):
    def __call__(self, attn, hidden_states):
        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)
        mixed = query.relu() @ (key.relu().transpose(1, 2) @ attn.convolve(value))
        return attn.to_out[0](mixed)


class OfThreeAtOnce(Linear):
    def __call__(self, attn, hidden_states):
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        mixed = query.relu() @ (key.relu().transpose(1, 2) @ value)
        return attn.to_out[0](mixed)


class Masked(Linear):
    def __call__(self, attn, hidden_states, attention_mask=None):
        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)
        mixed = query.relu() @ ((key.relu() * attention_mask).transpose(1, 2) @ value)
        return attn.to_out[0](mixed)


def test_a_core_that_cannot_be_told_from_the_layers_around_it_is_left_alone():
    assert grafted_class(Linear)._original is Linear
    for processor in (WithItsOwnConvolution, OfThreeAtOnce, Masked):
        with pytest.raises(OperatorError, match="no core to replace"):
            grafted_class(processor)


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
    exact = predict(model, name)
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
        assert predict(model, name, **sizes).isfinite().all()
