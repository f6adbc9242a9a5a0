"""Scores as files and tables, and protocols that do not belong together."""

import math

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import FileError, MismatchError, UnknownNameError
from diffusers_graft.evaluation.protocol import _describe_tf32, group_by_protocol, protocol_differences
from diffusers_graft.evaluation.scores import Scores, compare_scores, load_scores, select_comparable
from diffusers_graft.serialization.model_card import card

from ..models import tiny_dit

SHORT = Scores({"fid": 2.0}, {"samples": 8, "FID.reference": "abc"})
LONG = Scores({"fid": 1.0, "kid": math.nan}, {"samples": 50, "FID.reference": "abc"})


def test_a_file_holds_an_entry_for_each_state_of_a_model(tmp_path):
    path = tmp_path / "scores.json"
    LONG.save(path, "original")
    SHORT.save(path)
    SHORT.save(path, "original")
    assert list(load_scores(path)) == ["original", "grafted"]
    assert Scores.load(path, "original") == SHORT
    LONG.save(path)
    loaded = Scores.load(path)
    assert loaded["fid"] == 1
    assert math.isnan(loaded["kid"])
    assert loaded.protocol == LONG.protocol
    with pytest.raises(UnknownNameError, match="grafted"):
        Scores.load(path, "graft")


@pytest.mark.parametrize(
    "text", ['{"grafted": 1}', '{"a": {"values": {"fid": "low"}}}', '{"a": {"values": []}}', "[]"]
)
def test_a_damaged_file_of_scores(text, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(FileError):
        load_scores(path)
    with pytest.raises(FileError):
        SHORT.save(path)
    assert path.read_text() == text


def test_scores_of_different_protocols_refuse_one_table():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    rows = {"original": SHORT, "grafted": LONG}
    with pytest.raises(MismatchError, match="samples is 8 for 'original', 50 for 'grafted'"):
        compare_scores(rows)
    with pytest.raises(MismatchError, match="samples is 8"):
        card(model, scores=rows)
    table = compare_scores({"original": SHORT, "grafted": Scores(LONG.values, SHORT.protocol)})
    assert str(table).splitlines()[-2:] == ["grafted     1  nan", "Protocol: samples 8, FID.reference abc."]
    assert "samples 8" in SHORT._repr_html_()


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        ({"seed": 1}, {"seed": 1}, False),
        ({"seed": 1}, {}, True),
        ({"FID.samples": 1}, {}, False),  # not measured there
        ({"FID.samples": 1}, {"FID.samples": 2}, True),
    ],
)
def test_what_makes_protocols_different(one, other, differs):
    assert bool(protocol_differences({"a": one, "b": other})) == differs


def test_tf32_is_named_by_where_it_rounds(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert _describe_tf32(gpu) == "off"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert _describe_tf32(gpu) == "convolutions"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert _describe_tf32(gpu) == "matmul and convolutions"
    assert _describe_tf32(torch.device("cpu")) == "off"


def test_the_card_prints_the_protocol_of_all_rows():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    rows = {"original": dg.Scores({"loss": 1.0}, {"seed": 0}), "grafted": SHORT}
    rows["grafted"] = dg.Scores(SHORT.values, {"seed": 0, "FID.reference": "abc"})
    assert "Protocol: seed 0, FID.reference abc." in card(model, scores=rows)


def test_rows_of_one_protocol_stand_together(caplog):
    rows = {"original": SHORT, "before": LONG, "grafted": Scores({"loss": 1.0}, {"samples": 8})}
    assert group_by_protocol({name: scores.protocol for name, scores in rows.items()}) == [
        ["original", "grafted"],
        ["before"],
    ]
    assert list(select_comparable(rows)) == ["original", "grafted"]
    assert "before" in caplog.text
    assert select_comparable({}) == {}
