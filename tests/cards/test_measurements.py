"""Tables of scores and of speed."""

import yaml

import diffusers_graft as dg
from diffusers_graft.cards.measurements import speed_table
from diffusers_graft.serialization.model_card import card

from ..models import SCHEDULER, batches, tiny_dit
from ..serialization.forging import RULES

SPEED = [
    {"tokens": tokens, "name": name, "milliseconds": 2.0, "ratio": ratio, "low": 0.9, "high": 1.1}
    for tokens, ratio in ((16, 1.3), (64, 0.8))
    for name, ratio in (("original", 1.0), ("grafted", ratio))
]


def front(text):
    return yaml.safe_load(text.split("---")[1])


def test_names_break_no_table():
    model = tiny_dit()
    model.set_graft(RULES)
    text = card(model, scores={"a|b\nc": dg.Scores({"x|y": 2.0})}, speed=[{**row, "name": "a|b"} for row in SPEED])
    for row in (r"| model | x\|y |", r"| a\|b c | 2 |", r"| 64 | a\|b | 2 | 0.800 (0.900 to 1.100) |"):
        assert row in text.splitlines()


def test_numbers_that_are_not_finite_are_written_as_text(tmp_path):
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
