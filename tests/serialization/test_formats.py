"""Older formats are read; variants and the arguments of loading do what diffusers' do."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import FileError, StateError

from ..models import predict, tiny_dit
from .forging import CONFIG, PROOF, RULES, WEIGHTS, saved


def test_variants_lie_side_by_side(tmp_path):
    first = saved(tmp_path)
    second = saved(tmp_path, rules={"self_attention[0]": "neighborhood"}, variant="other")
    assert {CONFIG, WEIGHTS, PROOF, "graft_model.other.safetensors", "graft_config.other.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    for variant, expected in ((None, first), ("other", second)):
        model = tiny_dit()
        model.load_graft(tmp_path, variant=variant)
        assert torch.equal(predict(model), expected)
    with pytest.raises(FileError, match="graft_model.none.safetensors"):
        tiny_dit().load_graft(tmp_path, variant="none")


def test_variants_of_whole_models(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert torch.equal(predict(dg.load_pretrained(tmp_path, variant="fp16")), predict(model))
    with pytest.raises(FileError, match="There is no diffusion_pytorch_model"):
        dg.load_pretrained(tmp_path)


def test_a_variant_of_a_whole_model_leaves_the_others_as_they_were(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    expected = predict(model)
    model.save_pretrained(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    assert torch.equal(predict(dg.load_pretrained(tmp_path)), expected)
    for load in (dg.load_pretrained, type(model).from_pretrained):
        assert torch.equal(predict(load(tmp_path, variant="bf16", dtype=torch.bfloat16)), predict(model))


def test_a_plain_variant_does_not_lie_beside_a_grafted_one(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    expected = predict(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(StateError, match="variant None.*folder of its own"):
        tiny_dit().save_pretrained(tmp_path, variant="bf16")
    assert torch.equal(predict(dg.load_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("low", [True, False])
def test_dtype_and_device(low, tmp_path):
    expected = saved(tmp_path / "graft")
    model = tiny_dit()
    model.load_graft(tmp_path / "graft", dtype=torch.float64, device="cpu")
    assert predict(model).dtype == torch.float64
    assert (predict(model) - expected).abs().max() < 1e-4
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_pretrained(tmp_path / "whole")
    loaded = dg.load_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16, device="cpu", low_cpu_mem_usage=low)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(predict(dg.load_pretrained(tmp_path / "whole", low_cpu_mem_usage=low)), predict(model))


def test_saving_with_fewer_shards_leaves_none_of_the_old(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]
    assert torch.equal(predict(dg.load_pretrained(tmp_path)), predict(model))
