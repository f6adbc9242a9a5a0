"""LoRA that the graft brought goes along with whole models, unfused; what somebody else put there is not taken."""

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft.errors import FileError, StateError
from diffusers_graft.serialization import lora as lora_module

from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit
from .forging import read_mark, write_mark
from .pipelines import draw, pipeline

RULES = {"self_attention[1::2]": "neighborhood"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def trained(model, **settings):
    model.set_graft(RULES)
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "proj"], **settings)
    dg.finetune(
        model,
        batches(channels=model.config.in_channels),
        dg.FinetuneConfig(steps=2, lr=1e-2, train="operators", lora=lora, progress=False),
        noise_scheduler=SCHEDULER,
    )
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    model = trained(tiny_dit(), use_rslora=True)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("low", [True, False])
def test_a_whole_model_comes_back_with_its_lora_bit_for_bit(low, whole, tmp_path):
    model, folder = whole
    expected = predict(model)
    loaded = dg.load_pretrained(folder, low_cpu_mem_usage=low)
    assert torch.equal(predict(loaded), expected)
    assert loaded.graft.adapters.keys() == model.graft.adapters.keys() != set()
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(predict(DiTTransformer2DModel.from_pretrained(folder)), expected)
    loaded.save_pretrained(tmp_path, max_shard_size="20KB")
    assert torch.equal(predict(dg.load_pretrained(tmp_path)), expected)


def test_it_is_lora_and_not_fused(whole):
    model, folder = whole
    names = load_file(folder / WEIGHTS)
    assert "transformer_blocks.0.attn1.to_q.weight" in names
    assert "transformer_blocks.0.attn1.to_q.lora_A.weight" in names
    assert not [name for name in names if "base_layer" in name]
    assert torch.equal(
        names["transformer_blocks.0.attn1.to_q.weight"], tiny_dit().transformer_blocks[0].attn1.to_q.weight
    )


def test_so_many_layers_that_peft_shortens_their_list(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    lora = LoraConfig(r=2, target_modules="all-linear")
    dg.finetune(
        model,
        batches(1),
        dg.FinetuneConfig(steps=1, train="operators+lora", lora=lora, progress=False),
        noise_scheduler=SCHEDULER,
    )
    assert len(model.graft.adapters) >= 20
    model.save_graft(tmp_path)
    fresh = tiny_dit()
    fresh.load_graft(tmp_path)
    assert torch.equal(predict(fresh), predict(model))


LORA = LoraConfig(r=2, target_modules=["to_q", "proj"])


@pytest.mark.parametrize(
    "stages",
    [
        [{"train": "all", "lora": LORA}],
        [{"lora": LORA}, {"train": "all"}],
        [{"train": "all"}, {"lora": LORA}],
    ],
    ids=["beside each other", "LoRA first", "all first"],
)
def test_lora_and_all_weights_in_any_order(stages, tmp_path):
    model = tiny_dit()
    before = tensors_of(model)
    model.set_graft(RULES)
    for settings in stages:
        dg.finetune(
            model,
            batches(1),
            dg.FinetuneConfig(steps=1, lr=1e-2, progress=False, **settings),
            noise_scheduler=SCHEDULER,
        )
    expected = predict(model)
    model.save_graft(tmp_path)
    model.unset_graft()
    assert same_tensors(model, before)
    model.load_graft(tmp_path)
    assert torch.equal(predict(model), expected)
    model.unset_graft()
    assert same_tensors(model, before)


def test_in_half_precision_and_in_a_pipeline(tmp_path):
    pipe = pipeline()
    trained(pipe.transformer)
    pipe = pipe.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    assert (draw(DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)) == draw(pipe)).all()


def test_lora_of_somebody_else_is_not_saved_by_half(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    with pytest.raises(StateError, match="LoRA layers that are not the graft's"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_damaged_description_of_lora_is_refused(whole, tmp_path):
    model, _ = whole
    model.save_pretrained(tmp_path)
    description = read_mark(tmp_path)
    for lora in (
        None,
        {**description["lora"], "layers": {}},
        {**description["lora"], "layers": {"transformer_blocks.0.attn1.to_q": {"r": 3, "alpha": 3}}},
    ):
        write_mark(tmp_path, {**description, "lora": lora})
        with pytest.raises(FileError, match="LoRA"):
            dg.load_pretrained(tmp_path)


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def fuse(model):
    for layer in lora_layers(model):
        layer.merge()


def disable(model):
    for layer in lora_layers(model):
        layer.enable_adapters(enabled=False)


def second_adapter(model):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model, adapter_name="style")


STATES = {
    "fused": (fuse, "fused into the weights"),
    "disabled": (disable, "is disabled"),
    "one of two": (second_adapter, "style"),
}


@pytest.mark.parametrize("verb", ["save_graft", "save_pretrained"])
@pytest.mark.parametrize("name", STATES)
def test_a_lora_whose_state_is_not_its_tensors_is_not_saved(name, verb, tmp_path):
    change, words = STATES[name]
    model = trained(tiny_dit())
    change(model)
    with pytest.raises(StateError, match=words):
        getattr(model, verb)(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_a_rescaled_lora_comes_back_as_it_computes(settings, tmp_path):
    model = trained(tiny_dit(), **settings)
    for number, layer in enumerate(lora_layers(model)):
        layer.set_scale("default", 0.3 + 0.1 * number)
    expected = predict(model)
    model.save_graft(tmp_path / "graft")
    model.save_pretrained(tmp_path / "whole")
    again = tiny_dit()
    again.load_graft(tmp_path / "graft")
    assert torch.equal(predict(again), expected)
    assert torch.equal(predict(dg.load_pretrained(tmp_path / "whole")), expected)


def test_a_lora_that_was_fused_and_unloaded_is_saved_once_with_the_weights(tmp_path):
    model = trained(tiny_dit())
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            model.set_submodule(path, layer.get_base_layer())
    with pytest.raises(StateError, match="Save the model with save_pretrained"):
        model.save_graft(tmp_path / "graft")
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(predict(dg.load_pretrained(tmp_path / "whole")), predict(model))


@pytest.mark.parametrize(
    "row",
    [
        {"r": 60_000, "alpha": 1},
        {"r": 2, "alpha": 1e300},
        {"r": 2, "alpha": 1, "scaling": -1e9},
        {"r": 2, "alpha": True},
    ],
    ids=["rank without tensors", "alpha", "scaling", "kind"],
)
def test_numbers_of_a_lora_are_bounded_before_it_is_built(row, whole, tmp_path, monkeypatch):
    model, _ = whole
    model.save_pretrained(tmp_path)
    description = read_mark(tmp_path)
    layers = {**description["lora"]["layers"], "transformer_blocks.0.attn1.to_q": row}
    write_mark(tmp_path, {**description, "lora": {**description["lora"], "layers": layers}})
    monkeypatch.setattr(lora_module, "add_lora", lambda *arguments: pytest.fail("it was built"))
    with pytest.raises(FileError, match="LoRA is damaged"):
        dg.load_pretrained(tmp_path)
