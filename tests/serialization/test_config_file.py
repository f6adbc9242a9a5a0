"""Descriptions: their names, their variants, the files that they list."""

import json
import os

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import FileError
from diffusers_graft.planning.plan import GraftPlan
from diffusers_graft.serialization.config_file import read_plan, require_format

from ..models import predict, tiny_dit
from .forging import CONFIG, OTHER, PROOF, WEIGHTS, grafted, saved


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


@pytest.mark.parametrize("variant", ["a/b", "*", ".", 5], ids=str)
def test_a_variant_is_a_word(variant, tmp_path):
    """A star would sweep away every other variant."""
    model = grafted(OTHER)
    for verb in (model.save_graft, model.save_pretrained, tiny_dit().load_graft, dg.load_pretrained):
        with pytest.raises(FileError, match="A variant is a word"):
            verb(tmp_path, variant=variant)
    assert not list(tmp_path.iterdir())


FOREIGN = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "graft_operator_mine.py",
    "graft_model.old.bin",
    "notes.txt",
]


@pytest.mark.parametrize("verb", ["save_graft", "save_pretrained"])
def test_files_that_no_save_of_ours_wrote_stay(verb, tmp_path):
    for name in FOREIGN:
        (tmp_path / name).write_text(name)
    for rules in (OTHER, {"self_attention[0]": "hyena_x"}):
        getattr(grafted(rules), verb)(tmp_path, self_contained=True)
    assert [name for name in FOREIGN if (tmp_path / name).read_text() != name] == []
    sources = {path.name for path in tmp_path.glob("graft_operator_*.py")}
    assert sources == {"graft_operator_hyena_x.py", "graft_operator_mine.py"}


def test_a_description_lists_the_files_of_its_save(tmp_path):
    grafted(OTHER).save_graft(tmp_path, self_contained=True)
    listed = json.loads((tmp_path / CONFIG).read_text())["files"]
    assert set(listed) == {path.name for path in tmp_path.iterdir()}


def test_an_untrusted_description_has_no_other_file_removed(tmp_path):
    (tmp_path / "graft").mkdir()
    for name in ("../mine.txt", "notes.txt", ".profile", "data.safetensors"):
        (tmp_path / "graft" / name).write_text("mine")
    names = ["../mine.txt", "notes.txt", ".profile", "data.safetensors", 5, None, "", "graft_model\0"]
    (tmp_path / "graft" / CONFIG).write_text(json.dumps({"files": names}))
    grafted(OTHER).save_graft(tmp_path / "graft")
    for name in ("../mine.txt", "notes.txt", ".profile", "data.safetensors"):
        assert (tmp_path / "graft" / name).read_text() == "mine"


def test_files_of_one_variant_stay_when_another_is_saved_again(tmp_path):
    first = grafted({"self_attention[0]": "hyena_x"})
    first.save_graft(tmp_path, self_contained=True)
    for rules in (OTHER, {"self_attention[1]": "linear_attention"}):
        grafted(rules).save_graft(tmp_path, variant="other", self_contained=True)
    sources = {path.name for path in tmp_path.glob("graft_operator_*.py")}
    assert sources == {"graft_operator_hyena_x.py", "graft_operator_linear_attention.py"}


def test_a_card_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    with pytest.raises(FileError, match="not a regular file"):
        grafted(OTHER).save_graft(tmp_path)


def test_a_format_that_was_never_released_is_refused():
    with pytest.raises(FileError, match="has format 1, which no released version wrote"):
        require_format({"format": 1}, "there")


def test_a_plan_of_more_edits_than_the_model_has_modules_is_not_read(monkeypatch):
    monkeypatch.setattr(GraftPlan, "from_dict", lambda data: pytest.fail("it was read"))
    with pytest.raises(FileError, match="5,000 edits, for a DiTTransformer2DModel"):
        read_plan({"edits": [{}] * 5000}, tiny_dit())
