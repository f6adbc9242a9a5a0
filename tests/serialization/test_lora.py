"""LoRA that the graft brought goes along with whole models, unfused; what somebody else put there is not taken."""

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft.errors import FileError, StateError

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
