"""The arguments of loading are the same for `set_graft`, `load_graft` and `load_pretrained`, and none is passed over."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub import HfApi

import diffusers_graft as dg
from diffusers_graft.errors import FileError, StateError, UnknownNameError

from ..models import predict, tiny_dit
from .forging import RULES
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


@pytest.fixture
def whole(saves):
    return saves[0] / "load_pretrained" / "deep"


@pytest.mark.parametrize(
    "arguments",
    [{"device_map": "auto"}, {"device_map": {"": 0}}, {"torch_dtype": "auto"}, {"quantization_config": 4}],
    ids=str,
)
def test_what_from_pretrained_cannot_do_for_a_grafted_model(arguments, whole):
    with pytest.raises(StateError, match="A grafted model is loaded"):
        DiTTransformer2DModel.from_pretrained(whole, **arguments)


def test_from_pretrained_tells_how_it_went(whole):
    model, told = DiTTransformer2DModel.from_pretrained(whole, output_loading_info=True)
    assert model.graft is not None
    assert not any(told.values())


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
