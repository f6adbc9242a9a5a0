"""diffusers' saving and loading, of grafted models and of plain ones."""

import json
import os

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel

import diffusers_graft as dg
from diffusers_graft.core import storage
from diffusers_graft.errors import FileError, StateError
from diffusers_graft.serialization.describe import hub_name

from ..models import predict, tiny_dit
from .forging import RULES, grafted
from .pipelines import draw, pipeline
from .test_interrupted_saves import one_of
from .test_upload import TOKEN, hub  # noqa: F401


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a grafted model."""
    folder = tmp_path_factory.mktemp("whole")
    grafted(RULES).save_pretrained(folder)
    return folder


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


def test_processes_beside_the_main_one_write_nothing(tmp_path):
    one_of(1.0).save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_a_plain_save_removes_what_the_grafted_save_before_it_wrote(variant, tmp_path):
    grafted(RULES).save_pretrained(tmp_path, variant=variant, self_contained=True, max_shard_size="20KB")
    (tmp_path / "graft_operator_mine.py").write_text("mine")
    plain = tiny_dit()
    plain.save_pretrained(tmp_path, variant=variant)
    plain.save_pretrained(tmp_path / "fresh", variant=variant)
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {path.name for path in (tmp_path / "fresh").iterdir()} | {"graft_operator_mine.py"}
    assert torch.equal(predict(DiTTransformer2DModel.from_pretrained(tmp_path, variant=variant)), predict(plain))


def test_a_plain_save_leaves_the_words_of_a_person_on_the_card(tmp_path):
    grafted(RULES).save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace("## Edits", "## My notes\n\nFor the workshop.\n\n## Edits"))
    tiny_dit().save_pretrained(tmp_path)
    assert "For the workshop." in card.read_text()
    assert "hyena_x" not in card.read_text()


def test_a_plain_save_leaves_a_graft_of_the_folder_as_it_was(tmp_path):
    model = grafted(RULES)
    model.save_graft(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.save_pretrained(tmp_path)
    tiny_dit().save_pretrained(tmp_path)
    assert before.keys() <= {path.name for path in tmp_path.iterdir()}
    again = tiny_dit()
    again.load_graft(tmp_path)
    assert torch.equal(predict(again), predict(model))


def test_a_plain_save_that_fails_leaves_the_grafted_model(tmp_path, monkeypatch):
    model = grafted(RULES)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(storage, "_flush_folder", lambda folder: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(FileError, match="unchanged"):
        tiny_dit().save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(predict(dg.load_pretrained(tmp_path)), predict(model))


def test_a_configuration_that_is_a_pipe_is_not_waited_for(whole, tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for load in (DiTTransformer2DModel.from_pretrained, dg.load_pretrained):
        with pytest.raises(FileError, match="not a regular file"):
            load(tmp_path)
    with pytest.raises(FileError, match="not a regular file"):
        grafted(RULES).save_pretrained(tmp_path)


def test_a_base_from_a_relative_folder_is_no_repository(tmp_path, monkeypatch):
    tiny_dit().save_pretrained(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    model = DiTTransformer2DModel.from_pretrained("models/mine").eval()
    monkeypatch.chdir("/")
    assert hub_name(model) is None


def test_a_plain_save_is_not_hidden_by_an_index_that_was_there_before_the_graft(tmp_path):
    model = tiny_dit()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    grafted(RULES).save_pretrained(tmp_path)
    with torch.no_grad():
        model.proj_out_1.bias.add_(1)
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(DiTTransformer2DModel.from_pretrained(tmp_path)), predict(model))
