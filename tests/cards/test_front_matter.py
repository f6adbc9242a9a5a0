"""The front matter of a card, as the Hub's reader reads it."""

import pytest
from huggingface_hub import ModelCard

import diffusers_graft as dg
from diffusers_graft.serialization.model_card import card

from ..inspection.models import tiny
from ..models import tiny_dit


def metadata_of(text):
    return ModelCard(text).data.to_dict()


@pytest.fixture
def model():
    model = tiny_dit(2)
    model.register_to_config(_name_or_path="user/base")
    model.set_graft({"self_attention[0]": "hyena_x"})
    return model


def test_data_in_words_is_text_and_ids_are_metadata(model):
    text = card(model, datasets=["ILSVRC/imagenet-1k", "photos of my cat, 8 % held out"])
    assert metadata_of(text)["datasets"] == ["ILSVRC/imagenet-1k"]
    assert "Data: ILSVRC/imagenet-1k; photos of my cat, 8 % held out." in text
    assert "datasets" not in metadata_of(card(model, datasets=["some photos"]))


def test_scores_name_a_task_and_a_data_set_that_can_be_ids(model):
    scores = {"original": dg.Scores({"fid": 2.0}), "grafted": dg.Scores({"fid": 3.0, "kid": float("inf")})}
    (result,) = metadata_of(card(model, scores=scores, datasets=["some photos"]))["model-index"][0]["results"]
    assert result["task"] == {"type": "unconditional-image-generation"}
    assert result["dataset"] == {"type": "held-out", "name": "held-out batches"}
    assert result["metrics"] == [{"type": "fid", "value": 3.0, "name": "fid (grafted)"}]


def test_a_license_without_an_id_goes_with_name_and_link(model):
    text = card(model, license="other", license_name="cat-community", license_link="LICENSE.md")
    head = metadata_of(text)
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "cat-community", "LICENSE.md")


def test_sample_pictures_are_shown_by_the_hub(model, tmp_path):
    model.save_graft(tmp_path / "none", about={"sample_prompts": ["a cat"]})
    assert "widget" not in metadata_of((tmp_path / "none" / "README.md").read_text())
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "samples.png").write_bytes(b"")
    model.save_graft(tmp_path / "one", about={"sample_prompts": ["a cat", "two cats"]})
    text = (tmp_path / "one" / "README.md").read_text()
    assert metadata_of(text)["widget"] == [{"text": "a cat; two cats", "output": {"url": "samples.png"}}]
    assert "Prompts: a cat; two cats." in text


@pytest.mark.parametrize(
    ("name", "task"), [("WanTransformer3DModel", "text-to-video"), ("FluxTransformer2DModel", "text-to-image")]
)
def test_the_task_is_that_of_the_family(name, task):
    model = tiny(name)
    model.set_graft({"feed_forward[0]": "linear_mlp"})
    assert metadata_of(card(model))["pipeline_tag"] == task
    assert metadata_of(card(model, pipeline_tag="image-to-image"))["pipeline_tag"] == "image-to-image"
