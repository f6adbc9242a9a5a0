"""Offloading, casting and caches, before a graft and after it."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import OperatorError, StateError

from ..inspection.models import first, inputs_of, predict, tiny
from ..versions import indexes_float8, offloads_without_accelerator
from .flux import FLUX, RULES, expected, grafted

OFFLOADS = {
    "leaf": {"offload_type": "leaf_level"},
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
}


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("before", [True, False])
@offloads_without_accelerator
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
@indexes_float8
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


def test_operators_that_accelerate_offloads_layer_by_layer_are_refused_in_the_forward():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = grafted()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(StateError, match="is offloaded layer by layer"):
        predict(model, FLUX)
    remove_hook_from_submodules(model)
    assert torch.equal(predict(model, FLUX), expected())


@pytest.mark.parametrize("how", OFFLOADS)
@offloads_without_accelerator
def test_group_offloading_to_disk_follows_parts_that_change_places(how, tmp_path):
    model, cpu = tiny(FLUX), torch.device("cpu")
    plain = predict(model, FLUX)
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_to_disk_path=str(tmp_path / "weights"), **OFFLOADS[how]
    )
    assert torch.equal(predict(model, FLUX), plain)
    model.set_graft(RULES)
    assert torch.equal(predict(model, FLUX), expected())
    model.save_graft(tmp_path / "graft")
    for verb, output in ((model.disable_graft, plain), (model.enable_graft, expected()), (model.unset_graft, plain)):
        verb()
        assert torch.equal(predict(model, FLUX), output)
    fresh = tiny(FLUX)
    fresh.load_graft(tmp_path / "graft")
    assert torch.equal(predict(fresh, FLUX), expected())


def test_hooks_of_a_cache_are_named_and_not_taken_for_offloading():
    from diffusers import PyramidAttentionBroadcastConfig

    model = tiny(FLUX)
    cache = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    model.enable_cache(cache)
    with pytest.raises(OperatorError, match=r"pyramid_attention_broadcast.*model.disable_cache") as refused:
        model.set_graft(RULES)
    assert "offload" not in str(refused.value)
    model.disable_cache()
    model.set_graft(RULES)
    model.enable_cache(cache)
    with pytest.raises(StateError, match=r"pyramid_attention_broadcast.*model.disable_cache"):
        model.unset_graft()
    model.disable_cache()
    model.unset_graft()
    assert torch.equal(predict(model, FLUX), predict(tiny(FLUX), FLUX))
