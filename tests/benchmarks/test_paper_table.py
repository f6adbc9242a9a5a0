"""The cards that are shipped: for the paper's models, and the example."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from benchmarks.paper_table import EXAMPLE, example_card, paper_card, released

FOLDER = Path(__file__).parents[2] / "hub_cards"


def unversioned(text):
    return re.sub(r"^Made with .*$", "", text, flags=re.MULTILINE)


def test_there_is_one_for_every_released_model():
    assert len(released()) == 22
    assert {path.stem for path in (FOLDER / "paper").glob("*.md")} == set(released())
    for name, row in released().items():
        fid = re.search(r"fid([\d.]+)", name)[1].rstrip(".")
        assert f"{row['scores'][1]:.2f}" == fid
        card = ModelCard((FOLDER / "paper" / f"{name}.md").read_text())
        assert card.data.base_model == "facebook/DiT-XL-2-256"
        assert f'dg.import_upstream("grafting/{name}")' in card.text


@pytest.mark.parametrize(
    "name", ["dit-xl2-mha-hyena_x-50p-fid2.74", "dit-xl2-mlp-mlp_r_3-75p-fid2.61", "dit-xl2-mha-mha-100p-fid2.49"]
)
def test_they_are_what_is_rendered_now(name):
    """If a template or an operator changed: python -m benchmarks.paper_table hub_cards."""
    assert (FOLDER / "paper" / f"{name}.md").read_text() == paper_card(name)


def test_the_example_is_what_is_rendered_now():
    assert unversioned((FOLDER / EXAMPLE).read_text()) == unversioned(example_card())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dit-xl2-mha-hyena_x-50p-fid2.74", 5_330_304),
        ("dit-xl2-mha-hyena_se-50p-fid2.73", 5_336_064),
        ("dit-xl2-mha-hyena_y-50p-fid2.72", 5_318_784),
        ("dit-xl2-mha-mamba_2-50p-fid2.65", 8_290_864),
        ("dit-xl2-mlp-hyena_x-50p-fid2.64", 10_626_176),
        ("dit-xl2-mha-swa-50p-fid2.67", 5_313_024),
    ],
)
def test_parameters_are_those_of_the_paper(name, parameters):
    assert f"| {14 * parameters:,} |" in (FOLDER / "paper" / f"{name}.md").read_text()
