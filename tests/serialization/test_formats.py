"""Older formats are read; variants and the arguments of loading do what diffusers' do."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

import diffusers_graft as dg
from diffusers_graft.errors import FileError, MismatchError, StateError
from diffusers_graft.injection.graft import base_tensors
from diffusers_graft.serialization.tensors import digest

from ..models import SCHEDULER, batches, predict, tiny_dit
from .forging import CONFIG, PROOF, RULES, WEIGHTS, saved


def as_format_1(model, folder):
    """What the first version of this library wrote: LoRA in files of peft's, everything hashed whole."""
    graft = model.graft
    tensors = {name: tensor.detach().clone() for name, tensor in graft.tensors(model).items()}
    config = {
        "format": 1,
        "versions": {"diffusers_graft": "0.1.0"},
        "base": {
            "model_class": type(model).__name__,
            "name_or_path": None,
            "fingerprint": digest(base_tensors(model), as_bfloat16=True),
        },
        "plan": graft.plan.to_dict(),
        "tensors_sha256": digest(tensors),
        "history": graft.history,
    }
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"graft_config": json.dumps(config)})
    (folder / CONFIG).write_text(json.dumps(config))
    if graft.adapter_config is not None:
        graft.adapter_config.save_pretrained(folder)
        save_file(
            {name: t.contiguous() for name, t in get_peft_model_state_dict(model).items()},
            folder / "adapter_model.safetensors",
        )


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"])], ids=["plain", "lora"])
def test_format_1_is_read_and_saved_as_the_present_one(lora, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    if lora is not None:
        settings = dg.FinetuneConfig(steps=2, lr=1e-2, train="operators", lora=lora, progress=False)
        dg.finetune(model, batches(), settings, noise_scheduler=SCHEDULER)
    as_format_1(model, tmp_path / "old")
    loaded = tiny_dit()
    loaded.load_graft(tmp_path / "old")
    assert torch.equal(predict(loaded), predict(model))
    loaded.save_graft(tmp_path / "old")
    assert json.loads((tmp_path / "old" / CONFIG).read_text())["format"] == 2
    assert not list((tmp_path / "old").glob("adapter_*"))
    again = tiny_dit()
    again.load_graft(tmp_path / "old")
    assert torch.equal(predict(again), predict(model))


def test_format_1_is_checked_as_it_was(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    as_format_1(model, tmp_path / "old")
    other = tiny_dit()
    with torch.no_grad():
        other.proj_out_1.weight[3, 3] += 1
    with pytest.raises(MismatchError):
        other.load_graft(tmp_path / "old")
    path = tmp_path / "old" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match="edited or damaged"):
        tiny_dit().load_graft(tmp_path / "old")


def test_whole_models_of_format_1(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    expected = predict(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    description = config.pop("_graft")[""]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / CONFIG).write_text(
        json.dumps({"format": 1, **{name: description[name] for name in ("versions", "plan", "history")}})
    )
    assert torch.equal(predict(dg.load_pretrained(tmp_path)), expected)


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
