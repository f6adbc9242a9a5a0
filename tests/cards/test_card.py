"""Cards: what was done and measured, nothing else, and a person's words kept."""

import re
from pathlib import Path

import pytest
import yaml
from diffusers import DiTTransformer2DModel
from huggingface_hub import ModelCard
from torch.utils.flop_counter import FlopCounterMode

import diffusers_graft as dg
from diffusers_graft.cards.edit_table import _ranges, edit_rows
from diffusers_graft.cards.measurements import speed_table
from diffusers_graft.errors import FileError, GraftError, UnknownNameError
from diffusers_graft.evaluation.cost import FLOP_FORMULAS
from diffusers_graft.inspection import example_inputs
from diffusers_graft.serialization.model_card import card

from ..models import FAMILIES, SCHEDULER, batches, tiny_dit
from ..serialization.forging import RULES, saved

SPEED = [
    {"tokens": tokens, "name": name, "milliseconds": 2.0, "ratio": ratio, "low": 0.9, "high": 1.1}
    for tokens, ratio in ((16, 1.3), (64, 0.8))
    for name, ratio in (("original", 1.0), ("grafted", ratio))
]


def front(text):
    return yaml.safe_load(text.split("---")[1])


def sections(text):
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def test_only_what_was_done_and_measured(tmp_path):
    saved(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert sections(text) == ["Use", "Edits", "Recipe", "Citation"]
    assert {"license", "datasets", "model-index", "base_model"}.isdisjoint(front(text))


def test_everything_that_is_known(tmp_path):
    model = tiny_dit()
    model.register_to_config(_name_or_path="user/base")
    model.set_graft(RULES)
    dg.distill(
        model, model.unset_graft(), batches(), dg.DistillConfig(steps=2, progress=False), noise_scheduler=SCHEDULER
    )
    model.set_graft(RULES)
    dg.finetune(model, batches(), dg.FinetuneConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    about = {
        "license": "cc-by-nc-4.0",
        "datasets": ["letters"],
        "hardware": "two cores",
        "speed": SPEED,
        "limits": "Small.",
    }
    values = {"start": 0.7, "grafted": 0.6, "original": 0.5}
    scores = {name: dg.Scores({"loss": value}, {"samples": 8}) for name, value in values.items()}
    (tmp_path / "samples.png").write_bytes(b"")
    model.save_graft(tmp_path, scores=scores, about=about)
    text = (tmp_path / "README.md").read_text()
    assert sections(text) == [
        "Use",
        "Edits",
        "Training",
        "Recipe",
        "Evaluation",
        "Speed",
        "Samples",
        "Limits",
        "Citation",
    ]
    head = front(text)
    assert (head["base_model"], head["base_model_relation"], head["license"]) == (
        "user/base",
        "adapter",
        "cc-by-nc-4.0",
    )
    assert head["model-index"][0]["results"][0]["metrics"] == [
        {"type": "loss", "value": 0.6, "name": "loss (grafted)"}
    ]
    for words in ("breaks even by 64 tokens", "two cores", "Protocol: samples 8", "| grafted | 0.6 |", "Small."):
        assert words in text
    loaded = ModelCard(text)  # what the Hub's own reader makes of it
    assert loaded.data.eval_results[0].metric_value == 0.6
    assert loaded.data.tags[-2:] == ["hyena_x", "mlp"]


def test_edits_alike_stand_together():
    model = tiny_dit(num_layers=6)
    model.set_graft(
        {
            "self_attention[1::2]": "hyena_x",
            "self_attention[0]": "hyena_x",
            "feed_forward[:]": {"operator": "mlp", "expansion": 2},
        }
    )
    _, rows = edit_rows(model, model.graft)
    assert {(row["sites"], row["count"]) for row in rows} == {
        ("self_attention[0,1,3,5]", "4"),
        ("feed_forward[0:6]", "6"),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_flops_are_those_of_the_parts(family):
    model = FAMILIES[family]()
    inputs = example_inputs(model)
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with counter:
        model(**inputs)
    path = "transformer_blocks.1.ff"
    expected = sum(counter.get_flop_counts()[f"{type(model).__name__}.{path}"].values())
    parameters = sum(p.numel() for p in model.get_submodule(path).parameters())
    model.set_graft({"feed_forward[1]": {"operator": "mlp", "expansion": 8}})
    where, (row,) = edit_rows(model, model.graft)
    assert "16 tokens" in where
    assert row["flops_before"] == f"{expected / 1e9:.4g} G"
    assert row["flops_after"] == f"{2 * expected / 1e9:.4g} G"
    assert row["before"] == f"{parameters:,}"


def test_a_whole_model_is_a_finetune_of_its_base(tmp_path):
    model = tiny_dit()
    model.register_to_config(_name_or_path="user/base")
    model.set_graft(RULES)
    model.save_pretrained(tmp_path / "one")
    dg.load_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        text = (tmp_path / name / "README.md").read_text()
        assert front(text)["base_model_relation"] == "finetune"
        assert front(text)["base_model"] == "user/base"
        assert f'dg.load_pretrained("{name}")' in text


@pytest.mark.parametrize("place", ["own", "pipeline"])
@pytest.mark.parametrize(
    ("card", "license"),
    [("---\nlicense: apache-2.0\n---\n", "apache-2.0"), ("---\nlicense: [1\n---\n", None), ("# none\n", None)],
    ids=["told", "damaged", "none"],
)
def test_the_license_of_a_base_in_a_folder(place, card, license, tmp_path):
    tiny_dit().save_pretrained(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / ("transformer" if place == "own" else "") / "README.md").write_text(card)
    saved(tmp_path / "graft", DiTTransformer2DModel.from_pretrained(tmp_path / "pipe" / "transformer"))
    assert front((tmp_path / "graft" / "README.md").read_text()).get("license") == license


def test_the_verb():
    model = tiny_dit()
    model.set_graft(RULES)
    text = card(model, source="me/mine", license="mit", scores={"grafted": dg.Scores({"loss": 1.0})})
    assert 'model.set_graft("me/mine")' in text
    assert front(text)["license"] == "mit"
    with pytest.raises(UnknownNameError, match="Did you mean 'license'"):
        card(model, licence="mit")


def test_what_a_person_edits_is_kept(tmp_path):
    saved(tmp_path)
    path = tmp_path / "README.md"
    text = path.read_text()
    text = text.replace("library_name: diffusers-graft", "library_name: diffusers-graft\nlanguage: en").replace(
        "pipeline_tag: unconditional", "pipeline_tag: conditional"
    )
    text = text.replace("## Use\n", "## Story\n\nMy story.\n\n## Use\n\nRead this first.\n")
    text = re.sub(r"## Citation.*?(?=\n<!--)", "", text, flags=re.DOTALL)
    path.write_text(text)
    for _ in range(2):
        saved(tmp_path, rules={"self_attention[0]": "neighborhood"})
        text = path.read_text()
        assert "neighborhood" in text
        assert "hyena_x" not in text.partition("## Edits")[2].partition("<!--")[0]
        for words in ("My story.", "Read this first.", "language: en", "pipeline_tag: conditional"):
            assert words in text
        assert "Citation" not in text.partition("<!--")[0]
        assert text.count("## Use") == text.count("## Edits") == 1


def test_a_card_that_was_left_alone_is_brought_up_to_date(tmp_path):
    for rules in (RULES, {"self_attention[0]": "neighborhood"}, RULES):
        saved(tmp_path, rules=rules)
    assert "neighborhood" not in (tmp_path / "README.md").read_text()


def test_a_section_that_was_not_filled_for_once_comes_back(tmp_path):
    for scores in ({"grafted": dg.Scores({"fid": 2.0})}, None, {"grafted": dg.Scores({"fid": 3.0})}):
        saved(tmp_path, scores=scores)
        assert ("Evaluation" in sections((tmp_path / "README.md").read_text())) is bool(scores)


def test_a_card_without_our_note_is_somebody_elses(tmp_path):
    saved(tmp_path)
    (tmp_path / "README.md").write_text("my words")
    saved(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my words"


def test_the_folder_one_is_in_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_graft(".")
    assert f'model.set_graft("{tmp_path.name}")' in (tmp_path / "README.md").read_text()


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match=r"README\.md is damaged: it is not text .* move it away"):
        saved(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"


@pytest.mark.parametrize(
    "about",
    [
        {"license": Path("x")},
        {"speed": "fast"},
        {"speed": [{"x": 1}]},
        {"datasets": "letters"},
        {"hardware": float("nan")},
    ],
    ids=str,
)
def test_what_no_card_can_hold_is_refused(about, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    with pytest.raises(GraftError, match="card"):
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


def test_names_break_no_table():
    model = tiny_dit()
    model.set_graft(RULES)
    text = card(model, scores={"a|b\nc": dg.Scores({"x|y": 2.0})}, speed=[{**row, "name": "a|b"} for row in SPEED])
    for row in (r"| model | x\|y |", r"| a\|b c | 2 |", r"| 64 | a\|b | 2 | 0.800 (0.900 to 1.100) |"):
        assert row in text.splitlines()


def test_numbers_that_are_not_finite_are_told_as_text(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    dg.finetune(
        model,
        batches(),
        dg.FinetuneConfig(steps=1, max_grad_norm=float("inf"), progress=False),
        noise_scheduler=SCHEDULER,
    )
    model.save_graft(tmp_path, scores={"grafted": dg.Scores({"loss": float("nan"), "fid": 2.0})})
    text = (tmp_path / "README.md").read_text()
    assert "| grafted | NaN | 2 |" in text
    assert [metric["type"] for metric in front(text)["model-index"][0]["results"][0]["metrics"]] == ["fid"]
    assert '"max_grad_norm": "Infinity"' in (tmp_path / "graft_config.json").read_text()
    tiny_dit().load_graft(tmp_path)


def test_break_even_is_the_size_from_which_on_it_is_faster():
    def rows(*ratios):
        return [
            {"tokens": 4**n, "name": "g", "milliseconds": 1.0, "ratio": r, "low": r, "high": r}
            for n, r in enumerate(ratios)
        ]

    assert speed_table(rows(1.5, 0.9, 1.1, 0.8, 0.7))["break_even"] == "g breaks even by 64 tokens"
    assert "not the faster one" in speed_table(rows(1.5, 1.2))["break_even"]
    assert speed_table([]) is None


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([3], "3"),
        ([1, 2], "1,2"),
        ([0, 1, 2, 3], "0:4"),
        ([1, 3, 5], "1:6:2"),
        ([0, 1, 3], "0,1,3"),
    ],
)
def test_sites_are_named_as_a_rule_names_them(indices, text):
    assert ",".join(_ranges(indices)) == text


def test_rows_of_edits_tell_where_each_starts():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x", "self_attention[1]": {"operator": "hyena_x", "init": "random"}})
    _, rows = edit_rows(model, model.graft)
    first = model.graft.operators()["transformer_blocks.0.attn1"]
    assert [(row["sites"], row["start"]) for row in rows] == [
        ("self_attention[0]", first.start),
        ("self_attention[1]", "random weights"),
    ]
    assert all(row["flops_before"] and row["flops_after"] for row in rows)
