"""Grafted models saved in full."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft.errors import FileError, GraftError, StateError

from ..models import predict, tiny_dit
from .forging import OTHER, RULES, grafted, loaded
from .test_interrupted_saves import one_of


def test_whole_models(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    expected = predict(model)
    model.save_pretrained(tmp_path)
    for again in (dg.load_pretrained(tmp_path), DiTTransformer2DModel.from_pretrained(tmp_path)):
        assert type(again) is DiTTransformer2DModel
        assert torch.equal(predict(again), expected)
        with pytest.raises(StateError, match="loaded in full"):
            again.unset_graft()
    told = json.loads((tmp_path / "graft_config.json").read_text())  # for those who look
    assert told == json.loads((tmp_path / "config.json").read_text())["_graft"][""]
    names = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert not [name for name in names if name.startswith("transformer_blocks.0.ff.net")]  # no dead weights


@pytest.mark.parametrize("order", [("whole", "graft"), ("graft", "whole")], ids=" then ".join)
def test_a_graft_and_a_whole_model_lie_in_one_folder(order, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    for kind in order:
        (model.save_graft if kind == "graft" else model.save_pretrained)(tmp_path)
    loaded = tiny_dit()
    loaded.load_graft(tmp_path)
    assert torch.equal(predict(loaded), predict(model))
    assert torch.equal(predict(dg.load_pretrained(tmp_path)), predict(model))


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


def test_saving_with_fewer_shards_leaves_none_of_the_old(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]
    assert torch.equal(predict(dg.load_pretrained(tmp_path)), predict(model))


UNREADABLE = {
    "a graft that is not finite": (lambda model, folder: model.save_graft(folder), "not finite"),
    "a compressed graft": (lambda model, folder: model.save_graft(folder, compress=0.1), "not finite"),
    "a whole model that is not finite": (lambda model, folder: model.save_pretrained(folder), "not finite"),
    "pickles": (lambda model, folder: model.save_pretrained(folder, safe_serialization=False), "saved as safetensors"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_could_not_be_read_again_replaces_nothing(name, tmp_path):
    save, words = UNREADABLE[name]
    one_of(1.0).save_graft(tmp_path)
    one_of(1.0).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(GraftError, match=words):
        save(one_of(float("inf") if "finite" in words else 2.0), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plain_model_of_a_grafted_ones_configuration_is_saved_as_what_it_is(tmp_path):
    grafted(OTHER).save_pretrained(tmp_path / "grafted")
    plain = DiTTransformer2DModel.from_config(DiTTransformer2DModel.load_config(tmp_path / "grafted")).eval()
    plain.save_pretrained(tmp_path / "plain")
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "plain")
    assert loaded.graft is None
    assert torch.equal(predict(loaded), predict(plain))


def test_tied_weights_are_stored_for_each_name(tmp_path):
    model = grafted({"feed_forward[:2]": "mlp"})
    first, second = model.graft.operators().values()
    second.up.weight = first.up.weight
    model.save_graft(tmp_path / "graft")
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(loaded(tmp_path / "graft"), predict(model))
    assert torch.equal(predict(dg.load_pretrained(tmp_path / "whole")), predict(model))
