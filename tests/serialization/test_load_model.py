"""The arguments of loading are the same for `set_graft`, `load_graft` and `load_pretrained`, and none is passed over."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub import HfApi

import diffusers_graft as dg
from diffusers_graft.errors import FileError, GraftError, StateError, UnknownNameError
from diffusers_graft.serialization import load_model
from diffusers_graft.serialization.load_model import config_digest

from ..models import predict, tiny_dit
from .forging import RULES, saved
from .test_upload import TOKEN, hub  # noqa: F401


def by_set_graft(source, **arguments):
    model = tiny_dit()
    model.set_graft(source, **arguments)
    return model


def by_load_graft(source, **arguments):
    model = tiny_dit()
    model.load_graft(source, **arguments)
    return model


VERBS = {"set_graft": by_set_graft, "load_graft": by_load_graft, "load_pretrained": dg.load_pretrained}

verbs = pytest.mark.parametrize("verb", VERBS)


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """A folder for each verb, in a subfolder, in two variants; and the outputs of each variant."""
    root, expected = tmp_path_factory.mktemp("saves"), {}
    for variant, rules in ((None, RULES), ("other", {"self_attention[0]": "neighborhood"})):
        model = tiny_dit()
        model.set_graft(rules)
        for verb in VERBS:
            (model.save_pretrained if verb == "load_pretrained" else model.save_graft)(
                root / verb / "deep", variant=variant
            )
        expected[variant] = predict(model)
    return root, expected


@verbs
@pytest.mark.parametrize("low", [True, False])
def test_of_folders(low, verb, saves):
    root, expected = saves
    for name in expected:
        model = VERBS[verb](
            root / verb, subfolder="deep", variant=name, low_cpu_mem_usage=low, device="cpu", local_files_only=True
        )
        assert torch.equal(predict(model), expected[name])
    for word in ("dtype", "torch_dtype"):
        model = VERBS[verb](root / verb, subfolder="deep", low_cpu_mem_usage=low, **{word: torch.bfloat16})
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@verbs
def test_without_values_of_their_own_parts_cost_no_drawing(verb, saves, monkeypatch):
    """What `low_cpu_mem_usage` leaves out: `False` draws starts that the file replaces."""
    drawn = []
    draw = torch.nn.init.kaiming_uniform_

    def counted(tensor, *args, **kwargs):
        drawn.extend([] if tensor.is_meta else [tensor])
        return draw(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", counted)
    counts = []
    for low in (False, True):
        model = None if verb == "load_pretrained" else tiny_dit()
        drawn.clear()
        if model is None:
            dg.load_pretrained(saves[0] / verb, subfolder="deep", low_cpu_mem_usage=low)
        else:
            getattr(model, verb)(saves[0] / verb, subfolder="deep", low_cpu_mem_usage=low, verify=False)
        counts.append(len(drawn))
    assert counts[0] > 0 == counts[1]


@verbs
@pytest.mark.parametrize("hub", [False], indirect=True)
def test_of_repositories(verb, hub, saves, tmp_path):  # noqa: F811
    root, expected = saves
    HfApi(**TOKEN).create_repo("owner/graft", private=True)
    HfApi(**TOKEN).upload_folder(repo_id="owner/graft", folder_path=root / verb)
    revision = hub.repos["owner/graft"].refs["main"]
    arguments = {"subfolder": "deep", "variant": "other", "cache_dir": tmp_path / "mine", "revision": revision}
    with pytest.raises(FileError, match="private"):
        VERBS[verb]("owner/graft", **arguments, token="hf_guest")
    with pytest.raises(FileError, match="not in the local cache"):
        VERBS[verb]("owner/graft", **arguments, **TOKEN, local_files_only=True)
    assert torch.equal(predict(VERBS[verb]("owner/graft", **arguments, **TOKEN)), expected["other"])
    assert list((tmp_path / "mine").glob("models--owner--graft"))
    asked = len(hub.requests)
    assert torch.equal(
        predict(VERBS[verb]("owner/graft", **arguments, **TOKEN, local_files_only=True)), expected["other"]
    )
    assert len(hub.requests) == asked


@verbs
@pytest.mark.parametrize("dtype", ["float16", torch.int8, torch.float8_e4m3fn], ids=str)
def test_dtypes_are_those_that_models_compute_in(dtype, verb, saves):
    with pytest.raises(StateError, match="A grafted model is loaded in one of"):
        VERBS[verb](saves[0] / verb, subfolder="deep", dtype=dtype)


@verbs
def test_an_argument_that_nothing_takes(verb, saves):
    with pytest.raises(
        UnknownNameError, match="no argument of loading 'local_file_only'. Did you mean 'local_files_only'"
    ):
        VERBS[verb](saves[0] / verb, subfolder="deep", local_file_only=True)


@pytest.mark.parametrize(
    "arguments",
    [{"low_cpu_mem_usage": True}, {"dtype": torch.bfloat16}, {"revision": "main"}, {"local_file_only": True}],
    ids=["low_cpu_mem_usage", "dtype", "revision", "unknown"],
)
def test_what_is_built_here_is_not_loaded(arguments):
    model = tiny_dit()
    plan = dg.plan_graft(model, RULES)
    for graft in (RULES, plan, dg.build_graft(model, plan)):
        with pytest.raises(StateError, match=f"{next(iter(arguments))}.*this graft is built here"):
            model.set_graft(graft, **arguments)
        assert model.graft is None


def test_damaged_whole_models_are_refused(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(GraftError, match="damaged"):
        dg.load_pretrained(tmp_path)


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


def with_config(folder, **settings):
    """Have `config.json` ask for another model, honestly."""
    config = json.loads((folder / "config.json").read_text()) | settings
    config["_graft"][""]["model"] = config_digest(config)
    (folder / "config.json").write_text(json.dumps(config))


LARGE = {
    "wide": {"attention_head_dim": 10**7},
    "many heads": {"num_attention_heads": 10**8},
    "deep": {"num_layers": 10**9},
    "a table of positions": {"sample_size": 10**6},
    "many classes": {"num_embeds_ada_norm": 10**12},
    "no heads": {"num_attention_heads": 0},
    "no patch": {"patch_size": 0},
    "a word": {"attention_head_dim": "wide"},
}


@pytest.mark.parametrize("name", LARGE)
def test_a_configuration_out_of_proportion_is_refused_before_it_is_built(name, tmp_path, monkeypatch):
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "neighborhood"})
    model.save_pretrained(tmp_path)
    with_config(tmp_path, **LARGE[name])
    monkeypatch.setattr(load_model, "build_empty_graft", lambda *arguments: pytest.fail("it was built"))
    with pytest.raises(FileError):
        dg.load_pretrained(tmp_path)


def test_an_index_that_the_description_does_not_list_is_stale(tmp_path):
    model = tiny_dit()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.set_graft(RULES)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert torch.equal(predict(dg.load_pretrained(tmp_path)), predict(model))


def test_a_name_in_an_index_that_no_disk_holds_is_refused(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("\ud800", "x" * 300, "a\0b"):
        path.write_text(json.dumps({**index, "weight_map": dict.fromkeys(index["weight_map"], name)}))
        with pytest.raises(FileError):
            dg.load_pretrained(tmp_path)


def test_values_that_the_dtype_asked_for_makes_infinite_are_refused(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    with torch.no_grad():
        model.proj_out_1.bias[0] = 1e6
    model.save_pretrained(tmp_path)
    with pytest.raises(FileError, match="proj_out_1.bias in .* not finite"):
        dg.load_pretrained(tmp_path, dtype=torch.float16)
