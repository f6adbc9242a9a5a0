"""What a person adds to a card, and what no card can hold."""

from pathlib import Path

import pytest

import diffusers_graft as dg
from diffusers_graft.errors import GraftError, UnknownNameError
from diffusers_graft.serialization.model_card import card

from ..models import tiny_dit
from ..serialization.forging import RULES


@pytest.mark.parametrize(
    "about",
    [
        {"license": Path("x")},
        {"speed": "fast"},
        {"speed": [{"x": 1}]},
        {"datasets": "letters"},
        {"hardware": float("nan")},
        {"hardware": "\ud800"},
        {"limits": ["a", "list"]},
        {"sample_prompts": "a cat"},
    ],
    ids=str,
)
def test_what_no_card_can_hold_is_refused(about, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    with pytest.raises(GraftError, match="card"):
        model.save_graft(tmp_path / "graft", about=about)
    assert not (tmp_path / "graft").exists()


@pytest.mark.parametrize(
    ("about", "words"),
    [({"license": "Apache 2"}, "license of the Hub"), ({"pipeline_tag": "letters"}, "task of the Hub")],
    ids=str,
)
def test_metadata_that_the_hub_would_refuse_is_refused_before(about, words, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    with pytest.raises(UnknownNameError, match=words):
        model.save_graft(tmp_path / "graft", about=about)
    assert not (tmp_path / "graft").exists()


@pytest.mark.parametrize("scores", [dg.Scores({"fid": 2.0}), {"grafted": {"fid": 2.0}}], ids=["no row", "no Scores"])
def test_scores_are_rows_by_name(scores, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    for write in (card, lambda model, scores: model.save_graft(tmp_path / "graft", scores=scores)):
        with pytest.raises(GraftError, match="rows by name"):
            write(model, scores=scores)
    assert not (tmp_path / "graft").exists()
