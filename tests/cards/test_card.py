"""Cards: what was done and measured, and nothing else."""

import re
from dataclasses import replace

import pytest
import yaml
from diffusers import DiTTransformer2DModel
from huggingface_hub import ModelCard

import diffusers_graft as dg
from diffusers_graft.cards.edit_table import edit_rows
from diffusers_graft.errors import UnknownNameError
from diffusers_graft.planning import plan
from diffusers_graft.serialization.describe import LOADED_FROM
from diffusers_graft.serialization.model_card import card

from ..models import SCHEDULER, batches, tiny_dit
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


def test_a_card_shows_nothing_that_was_not_done_or_measured(tmp_path):
    saved(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert sections(text) == ["Use", "Edits", "Recipe", "Citation"]
    assert {"license", "datasets", "model-index", "base_model"}.isdisjoint(front(text))


def test_a_card_shows_everything_that_is_known(tmp_path):
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


def test_a_full_model_is_a_finetune_of_its_base(tmp_path):
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


def test_the_public_function_renders_a_card():
    model = tiny_dit()
    model.set_graft(RULES)
    text = card(model, source="me/mine", license="mit", scores={"grafted": dg.Scores({"loss": 1.0})})
    assert 'model.set_graft("me/mine")' in text
    assert front(text)["license"] == "mit"
    with pytest.raises(UnknownNameError, match="Did you mean 'license'"):
        card(model, licence="mit")


def test_a_card_names_and_cites_every_operator_that_there_is():
    """Cards are written from the registry: an operator that comes along needs no card of its own."""
    by_kind = {}
    for name in dg.operators.available():
        by_kind.setdefault(dg.operators.get(name).kinds[0], []).append(name)
    assert set(by_kind) == {"self_attention", "feed_forward", "block_pair"}
    parts = {
        f"{kind}[{i}]": by_kind[kind][i]
        for kind in ("self_attention", "feed_forward")
        for i in range(len(by_kind[kind]))
    }
    grafts = [parts, *({"block_pair[0]": name} for name in by_kind["block_pair"])]
    for rules in grafts:
        model = tiny_dit(num_layers=max(2, len(rules)))
        model.set_graft(rules)
        text = card(model)
        edits = text.split("## Edits")[1].split("## Recipe")[0]
        for name in rules.values():
            assert name in front(text)["tags"]
            assert re.search(rf"\b{name}\b", edits)
            number = dg.operators.get(name).paper.partition(", arXiv ")[2]
            assert number in text.split("## Citation")[1]


def test_a_card_in_the_working_directory_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_graft(".")
    assert f'model.set_graft("{tmp_path.name}")' in (tmp_path / "README.md").read_text()


def use_of(text):
    return re.search(r"```python\n(.*?)```", text.split("## Use")[1], re.DOTALL)[1]


@pytest.mark.parametrize("subfolder", [None, "transformer"])
def test_use_can_be_pasted_and_runs(subfolder, tmp_path, monkeypatch):
    """Folders of these names stand for repositories of the Hub."""
    base = tiny_dit(2)
    base.save_pretrained(tmp_path / "somebody" / "base" / (subfolder or ""))
    base.set_graft(RULES)
    base.save_graft(tmp_path / "me" / "graft")
    monkeypatch.chdir(tmp_path)
    model = DiTTransformer2DModel.from_pretrained("somebody/base", subfolder=subfolder).eval()
    vars(model)[LOADED_FROM] = replace(vars(model)[LOADED_FROM], folder=None)  # as from the Hub
    monkeypatch.chdir("/")
    model.set_graft(RULES)
    text = card(model, source="me/graft")
    assert "pip install diffusers-graft\n" in text
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(use_of(text), scope)
    assert scope["model"].graft.plan == model.graft.plan
    assert scope["model"].config["_name_or_path"] == "somebody/base"


def test_use_of_a_full_model_runs(tmp_path, monkeypatch):
    model = tiny_dit(2)
    model.set_graft(RULES)
    model.save_pretrained(tmp_path / "full")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(use_of((tmp_path / "full" / "README.md").read_text()), scope)
    assert scope["model"].graft.plan == model.graft.plan


def test_a_base_of_no_repository_is_not_given_out_as_one(tmp_path, monkeypatch):
    tiny_dit(2).save_pretrained(tmp_path / "checkpoints" / "dit")
    monkeypatch.chdir(tmp_path)
    model = DiTTransformer2DModel.from_pretrained("checkpoints/dit").eval()
    monkeypatch.chdir("/")
    model.set_graft(RULES)
    text = card(model)
    assert "checkpoints/dit" not in text
    assert "base_model" not in front(text)
    assert "which was in no repository" in text


def test_parts_of_an_imported_checkpoint_claim_no_start():
    model = tiny_dit(2)
    model.set_graft(
        {"self_attention[0]": "linear_attention", "feed_forward[0]": {"operator": "mlp", "init": "random"}}
    )
    starts = [row["start"] for row in edit_rows(model, model.graft, is_imported=True)[1]]
    assert starts == ["not known", "not known"]


def test_packages_of_operators_are_installed_with_the_library(monkeypatch):
    monkeypatch.setattr(plan, "package_of", lambda operator: {"name": "grid-tools", "version": "2.0"})
    model = tiny_dit(2)
    model.set_graft(RULES)
    assert "pip install diffusers-graft grid-tools==2.0\n" in card(model)
