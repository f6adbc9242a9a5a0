"""Saved and loaded, whole or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft.core.storage import parse_json, read_header, write_tensors
from diffusers_graft.errors import FileError, GraftError, MismatchError, StateError
from diffusers_graft.serialization.graft_folder import fill
from diffusers_graft.serialization.tensors import checksum, fingerprint, require_finite

from ..inspection.models import inputs_of, tiny
from ..models import FAMILIES, SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart
from .pipelines import draw, pipeline

FLUX = "FluxTransformer2DModel"
RULES = {
    "self_attention[1::2]": {"operator": "hyena_x", "init": "random"},
    "feed_forward[0]": {"operator": "mlp", "expansion": 6},
}


def saved(folder, model=None, rules=RULES):
    model = model or tiny_dit()
    model.set_graft(rules)
    model.save_graft(folder)
    return predict(model)


NEW_PROCESS = """
import sys, torch
from pathlib import Path
from tests.models import FAMILIES, predict
import diffusers_graft
seen = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = FAMILIES[folder.name.split()[0]](num_layers=6)
    model.load_graft(folder)
    seen[folder.name] = predict(model)
torch.save(seen, sys.argv[2])
"""
STAGE_TWO = {
    "all": {"train": "all"},
    "lora": {"train": "operators", "lora": LoraConfig(r=2, target_modules=["to_q", "proj"])},
}


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """Grafts by name: their folder, their outputs, and those that a new process got from it."""
    root, expected = tmp_path_factory.mktemp("elsewhere"), {}
    (root / "grafts").mkdir()
    for family, make in FAMILIES.items():
        names = ("sliding_window", "neighborhood", "hyena_x", "linear_attention")
        rules = {f"self_attention[{n}]": name for n, name in enumerate(names)}
        rules |= {
            "self_attention[4]": {"operator": "self_attention", "init": "random"},
            "feed_forward[1::2]": {"operator": "mlp", "expansion": 3},
        }
        expected[f"{family} operators"] = saved(root / "grafts" / f"{family} operators", make(num_layers=6), rules)
    for name, settings in STAGE_TWO.items():
        model = tiny_dit(num_layers=6)
        model.set_graft({"self_attention[1::2]": "neighborhood"})
        dg.finetune(
            model,
            batches(),
            dg.FinetuneConfig(steps=3, lr=1e-2, progress=False, **settings),
            noise_scheduler=SCHEDULER,
        )
        model.save_graft(root / "grafts" / f"dit {name}")
        expected[f"dit {name}"] = predict(model)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", NEW_PROCESS, str(root / "grafts"), str(root / "seen.pt")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    seen = torch.load(root / "seen.pt", weights_only=True)
    return {name: (root / "grafts" / name, output, seen[name]) for name, output in expected.items()}


@pytest.mark.parametrize(
    "name", [*(f"{family} operators" for family in FAMILIES), *(f"dit {name}" for name in STAGE_TWO)]
)
def test_a_new_process_loads_it_bit_for_bit(name, loaded_elsewhere):
    """Operators one after the other over the sites of one model; weights that stage two trained."""
    _, expected, seen = loaded_elsewhere[name]
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("name", STAGE_TWO)
def test_what_stage_two_trained_comes_back_too(name, loaded_elsewhere, tmp_path):
    folder, expected, _ = loaded_elsewhere[f"dit {name}"]
    fresh = tiny_dit(num_layers=6)
    before = tensors_of(fresh)
    fresh.load_graft(folder)
    fresh.save_graft(tmp_path / "again")
    fresh.unset_graft()
    assert same_tensors(fresh, before)
    again = tiny_dit(num_layers=6)
    again.load_graft(tmp_path / "again")
    assert torch.equal(predict(again), expected)


def test_the_folder_and_its_card(tmp_path):
    saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "graft_config.json",
        "graft_model.safetensors",
        "graft_proof.safetensors",
        "README.md",
    }
    card = (tmp_path / "README.md").read_text()
    for words in (
        "hyena_x(kernel_size=4",
        "`feed_forward[0]`",
        "library_name: diffusers-graft",
        "self_attention   ·█·█",
        "2506.05340",
    ):
        assert words in card
    assert "Evaluation" not in card  # nothing was measured


def test_saving_over_another_graft_replaces_it_whole(tmp_path):
    saved(tmp_path)
    expected = saved(tmp_path, rules={"self_attention[0]": "neighborhood"})
    model = tiny_dit()
    model.load_graft(tmp_path)
    assert torch.equal(predict(model), expected)


@pytest.mark.parametrize("source", ["/no/such/folder", "nothing", "./none", "user/name", Path("none")])
def test_a_folder_that_does_not_exist(source):
    with pytest.raises(FileError, match="There is no folder|not in the local cache"):
        tiny_dit().load_graft(source)


@pytest.mark.parametrize("source", [None, 5, ["user/name"]])
@pytest.mark.parametrize(
    "load", [lambda source: tiny_dit().load_graft(source), dg.load_pretrained, dg.import_upstream]
)
def test_what_is_loaded_has_a_name(load, source):
    with pytest.raises(FileError, match="a folder, or in a Hub repository user/name; got"):
        load(source)


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    model = tiny_dit()
    model.set_graft(RULES)
    for save in (model.save_graft, model.save_pretrained):
        with pytest.raises(FileError, match="is a file"):
            save(tmp_path / "file")


@pytest.mark.parametrize(
    "other", [tiny_pixart, lambda: tiny_dit(num_layers=2), lambda: tiny_dit(attention_head_dim=4)]
)
def test_a_graft_for_another_model_is_refused(other, tmp_path):
    saved(tmp_path)
    model = other()
    with pytest.raises(MismatchError):
        model.load_graft(tmp_path)
    assert model.graft is None


def test_other_weights_are_refused_unless_allowed(tmp_path):
    saved(tmp_path)
    model = tiny_dit()
    with torch.no_grad():
        model.proj_out_1.weight[0, 0] += 1
    with pytest.raises(MismatchError, match="allow_base_mismatch=True"):
        model.load_graft(tmp_path)
    model.load_graft(tmp_path, allow_base_mismatch=True)
    assert model.graft is not None


def edit(**changes):
    """A change of a large tensor `big` or a small one `few`."""

    def apply(tensors):
        return {name: changes[name](tensor.clone()) if name in changes else tensor for name, tensor in tensors.items()}

    return apply


SEEN = {
    "another value of a small tensor": edit(few=lambda t: t.index_fill_(0, torch.tensor([3]), 9)),
    "all values by one percent": edit(big=lambda t: t * 1.01),
    "an update of rank one": edit(big=lambda t: t + 0.1 * torch.randn(300, 1) @ torch.randn(1, 300)),
    "one row in fifty": edit(big=lambda t: t.index_fill_(0, torch.arange(0, 300, 50), 0)),
    "eight bits": edit(big=lambda t: (t * 16).round() / 16),
    "transposed": edit(big=lambda t: t.T.contiguous()),
    "another shape": edit(big=lambda t: t.view(150, 600)),
    "another name": lambda tensors: {"large": tensors["big"], "few": tensors["few"]},
}
UNSEEN = {
    "rounded to bfloat16": edit(big=lambda t: t.bfloat16(), few=lambda t: t.bfloat16()),
    "a single value between the samples": edit(
        big=lambda t: t.index_put_((torch.tensor(0), torch.tensor(7)), torch.tensor(9.0))
    ),
}


@pytest.mark.parametrize("change", [*SEEN, *UNSEEN])
def test_which_changes_of_a_base_its_fingerprint_sees(change):
    generator = torch.Generator().manual_seed(0)
    tensors = {"big": torch.randn(300, 300, generator=generator), "few": torch.randn(40, generator=generator)}
    same = fingerprint({**SEEN, **UNSEEN}[change](tensors)) == fingerprint(tensors)
    assert same == (change in UNSEEN)


def test_saved_grafts_know_their_base_and_their_weights_by_the_same_numbers_forever():
    tensors = {"large": torch.arange(20_000, dtype=torch.float32), "small": torch.arange(3).half()}
    assert fingerprint(tensors) == "9f5fc2ccb31b9787b7a2105f51a3ce4faec87a05f9d8afee5178e959ac704ebb"
    assert checksum(tensors) == "64f0f0f6ffe3d0cb976f4242629d770fd832a6da59d1f95a8f3c3114193423ae"


def test_files_of_weights_are_like_others(tmp_path):
    write_tensors(tmp_path / "weights", {"a": torch.ones(2)}, {"made": "here"})
    assert read_header(tmp_path / "weights") == {"format": "pt", "made": "here"}
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o644
    with pytest.raises(FileError, match="There is no others in"):
        read_header(tmp_path / "others")


def test_a_tensor_of_no_part_is_refused(tmp_path):
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, RULES))
    with pytest.raises(FileError, match="it holds nothing.weight, which this model does not have"):
        fill(model, graft, {"nothing.weight": torch.ones(1)}, tmp_path)


def test_values_are_finite_though_their_sum_may_not_be():
    require_finite({"large": torch.full((4,), 3e38)}, "there")
    with pytest.raises(FileError, match="a in there holds values that are not finite"):
        require_finite({"a": torch.tensor([1.0, torch.nan])}, "there")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "no JSON object"),
        ("{", "not JSON"),
        ('{"a": NaN}', "not JSON"),
        ("[1, " + "[" * 99 + "]" * 100, "nested deeper"),
    ],
)
def test_a_description_is_an_object_in_json(text, words):
    with pytest.raises(FileError, match=words):
        parse_json(text, "there")


def test_what_the_fingerprint_does_not_see_the_proof_does(tmp_path, caplog):
    saved(tmp_path)
    model = tiny_dit()
    table = model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight
    assert table.numel() > 2048
    with torch.no_grad():
        table.view(-1)[1] += 100
    with caplog.at_level("INFO"):
        model.load_graft(tmp_path)
    (told,) = [record for record in caplog.records if "proof replayed" in record.message]
    assert told.levelname == "WARNING"


def test_which_parts_of_another_base_differ_is_told(tmp_path):
    saved(tmp_path)
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[0].ff.net[0].proj.weight[0, 0] += 1
        model.transformer_blocks[1].attn1.to_q.weight[0, 0] += 1
    with pytest.raises(MismatchError, match="among them those of 2 parts that it replaces"):
        model.load_graft(tmp_path)


def test_a_bfloat16_base_is_still_the_same_base(tmp_path):
    saved(tmp_path)
    model = tiny_dit().to(torch.bfloat16)
    model.load_graft(tmp_path)
    assert predict(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("made", "loaded"),
    [(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float16, torch.float16)],
)
def test_a_float16_base_is_still_the_same_base(made, loaded, tmp_path):
    """Values that float16 rounds to the middle of two of bfloat16 go the other way from there."""

    def base(dtype):
        model = tiny_dit()
        with torch.no_grad():
            model.proj_out_1.weight.fill_(1 + 2**-8 + 2**-12)
        return model.to(dtype)

    saved(tmp_path, base(made))
    base(loaded).load_graft(tmp_path)
    other = base(loaded)
    with torch.no_grad():
        other.proj_out_1.weight[0, 0] += 1
    with pytest.raises(MismatchError):
        other.load_graft(tmp_path)


def test_the_proof_is_replayed(tmp_path, caplog):
    saved(tmp_path)
    with caplog.at_level("INFO"):
        tiny_dit().load_graft(tmp_path)
    assert "largest difference 0" in caplog.text
    (tmp_path / "graft_proof.safetensors").unlink()
    tiny_dit().load_graft(tmp_path)
    assert "carries no proof" in caplog.text


WIDE = {
    "a wide window": {"operator": "sliding_window", "window": (30, 30)},
    "a kernel as wide as the grid": {"operator": "neighborhood", "kernel": 15},
}


@pytest.mark.parametrize("config", WIDE.values(), ids=WIDE)
def test_what_needs_many_tokens_is_proved_on_as_many(config, tmp_path, caplog):
    model = tiny_dit(sample_size=32)
    model.set_graft({"self_attention[0]": config})
    model.save_graft(tmp_path)
    again = tiny_dit(sample_size=32)
    with caplog.at_level("INFO"):
        again.load_graft(tmp_path)
    assert "largest difference 0" in caplog.text
    assert torch.equal(predict(again), predict(model))


def test_without_example_inputs_the_last_forward_is_the_proof(tmp_path, caplog):
    model = tiny(FLUX)
    model.set_graft({"joint_attention[0]": "hyena_x"})
    with torch.no_grad():
        model(**inputs_of(FLUX))
    model.save_graft(tmp_path)
    with caplog.at_level("INFO"):
        tiny(FLUX).load_graft(tmp_path)
    assert "largest difference 0" in caplog.text


def test_an_operator_that_breaks_on_few_tokens_is_proved_on_more(tmp_path, monkeypatch, caplog):
    owner = dg.operators.get("identity")
    runs = owner.forward

    def breaks(self, query, key, value, context):
        if query.shape[2] < 64:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        return runs(self, query, key, value, context)

    monkeypatch.setattr(owner, "forward", breaks)
    model = tiny_dit(sample_size=32)
    model.set_graft({"self_attention[0]": "identity"})
    model.save_graft(tmp_path)
    with caplog.at_level("INFO"):
        tiny_dit(sample_size=32).load_graft(tmp_path)
    assert "largest difference 0" in caplog.text


def test_a_graft_that_refuses_every_known_input_is_saved_without_a_proof(tmp_path, caplog):
    model = tiny_dit()
    model.set_graft({"self_attention[0]": {"operator": "neighborhood", "kernel": 9}})
    model.save_graft(tmp_path)
    assert "saved without a proof" in caplog.text
    assert "kernel 9" in caplog.text
    again = tiny_dit()
    again.load_graft(tmp_path)
    assert "carries no proof" in caplog.text
    assert torch.equal(predict(again, size=20), predict(model, size=20))


def test_loading_onto_a_grafted_model_is_refused(tmp_path):
    saved(tmp_path)
    model = tiny_dit()
    model.set_graft({"self_attention[1]": "neighborhood"})
    grafted = predict(model)
    with pytest.raises(StateError):
        model.load_graft(tmp_path)
    assert torch.equal(predict(model), grafted)


def test_a_disabled_graft_is_not_saved_by_mistake(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.disable_graft()
    with pytest.raises(StateError, match="enable_graft"):
        model.save_graft(tmp_path)


def test_no_path_of_this_machine_is_saved(tmp_path):
    base = tmp_path / "base"
    tiny_dit().save_pretrained(base)
    model = DiTTransformer2DModel.from_pretrained(base)
    saved(tmp_path / "graft", model)
    for path in (tmp_path / "graft").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_whole_models(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    expected = predict(model)
    model.save_pretrained(tmp_path)
    for loaded in (dg.load_pretrained(tmp_path), DiTTransformer2DModel.from_pretrained(tmp_path)):
        assert type(loaded) is DiTTransformer2DModel
        assert torch.equal(predict(loaded), expected)
        with pytest.raises(StateError, match="loaded whole"):
            loaded.unset_graft()
    told = json.loads((tmp_path / "graft_config.json").read_text())  # for those who look
    assert told == json.loads((tmp_path / "config.json").read_text())["_graft"][""]
    names = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert not [name for name in names if name.startswith("transformer_blocks.0.ff.net")]  # no dead weights


def test_plain_models_are_saved_and_loaded_as_ever(tmp_path):
    model = tiny_dit()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "graft_config.json").exists()
    assert torch.equal(predict(DiTTransformer2DModel.from_pretrained(tmp_path)), predict(model))
    with pytest.raises(FileError, match="describes no graft"):
        dg.load_pretrained(tmp_path)


def test_a_plain_model_saved_over_a_grafted_one_is_plain(tmp_path):
    pipe = pipeline()
    plain = draw(pipe)
    pipe.transformer.set_graft(RULES)
    pipe.save_pretrained(tmp_path)
    pipe.transformer.unset_graft()
    pipe.save_pretrained(tmp_path)
    assert DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").graft is None
    assert (draw(DiffusionPipeline.from_pretrained(tmp_path)) == plain).all()


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


def test_damaged_whole_models_are_refused(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(GraftError, match="damaged"):
        dg.load_pretrained(tmp_path)


def test_pipelines(tmp_path):
    pipe = pipeline()
    pipe.transformer.set_graft(RULES)
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert (draw(DiffusionPipeline.from_pretrained(tmp_path)) == expected).all()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers_graft", "DiTTransformer2DModel"], (
        "diffusers alone would draw without the graft"
    )
    assert pipe.config["transformer"] == ("diffusers", "DiTTransformer2DModel")
    pipe.transformer.unset_graft()
    pipe.save_pretrained(tmp_path)
    assert "diffusers_graft" not in (tmp_path / "model_index.json").read_text()


@pytest.mark.parametrize("how", ["cast", "loaded"])
def test_a_whole_model_in_half_precision_is_the_same_however_it_came_to_it(how, tmp_path):
    """diffusers leaves tables of positions in float32 where it loads in bfloat16; casting rounds them."""
    tiny_dit().save_pretrained(tmp_path / "base")
    model = (
        tiny_dit().to(torch.bfloat16)
        if how == "cast"
        else DiTTransformer2DModel.from_pretrained(tmp_path / "base", torch_dtype=torch.bfloat16)
    )
    model.set_graft(RULES)
    model.save_pretrained(tmp_path / "whole")
    loaded = dg.load_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert torch.equal(predict(loaded), predict(model))
    assert dg.load_pretrained(tmp_path / "whole").pos_embed.pos_embed.dtype == torch.float32
