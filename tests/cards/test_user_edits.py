"""Sections that a person edits stay, the others are brought up to date."""

import re

import pytest

import diffusers_graft as dg
from diffusers_graft.errors import FileError

from ..serialization.forging import RULES, saved


def sections(text):
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def test_sections_that_a_person_edits_stay(tmp_path):
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


def test_unedited_sections_are_brought_up_to_date(tmp_path):
    for rules in (RULES, {"self_attention[0]": "neighborhood"}, RULES):
        saved(tmp_path, rules=rules)
    assert "neighborhood" not in (tmp_path / "README.md").read_text()


def test_a_section_that_was_empty_once_comes_back(tmp_path):
    for scores in ({"grafted": dg.Scores({"fid": 2.0})}, None, {"grafted": dg.Scores({"fid": 3.0})}):
        saved(tmp_path, scores=scores)
        assert ("Evaluation" in sections((tmp_path / "README.md").read_text())) is bool(scores)


def test_a_card_without_our_note_is_not_replaced(tmp_path):
    saved(tmp_path)
    (tmp_path / "README.md").write_text("my words")
    saved(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my words"


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match=r"README\.md is damaged: it is not text .* move it away"):
        saved(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"
