"""Tables as text, at the width of a terminal, and as HTML."""

import pytest

from diffusers_graft.core import tables
from diffusers_graft.core.sites import Site, Sites
from diffusers_graft.core.tables import Table, Tabular, terminal_width

ROWS = [("self_attention[1::2]", "transformer_blocks.0.attn1", "1.5"), ("mlp[0]", ":smile: <b>", "12.25")]
TABLE = Table(ROWS, heading=("site", "path", "share"), numbers=(2,), notes=("one inline",))


def test_columns_are_aligned_and_text_is_shown_as_it_is():
    assert str(TABLE).splitlines() == [
        "site                  path                        share",
        "self_attention[1::2]  transformer_blocks.0.attn1    1.5",
        "mlp[0]                :smile: <b>                 12.25",
        "one inline",
    ]


def test_a_rule_below_the_heading_is_as_wide_as_each_column():
    ruled = Table([("a", "1.25")], heading=("name", "x"), numbers=(1,), is_ruled=True)
    assert str(ruled) == "name     x\n----  ----\na     1.25"


def test_a_table_is_no_wider_than_it_may_be_and_names_of_rows_stay_in_one_piece():
    lines = TABLE.to_text(width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert sum("self_attention[1::2]" in line for line in lines) == 1
    assert "".join(line[22:34].strip() for line in lines[1:-2]) == "transformer_blocks.0.attn1"


def test_the_text_of_a_table_shows_nothing_by_itself_in_a_notebook(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *shown: pytest.fail(f"{shown} was shown"))
    assert str(TABLE).endswith("one inline")


def test_a_table_without_rows_is_its_heading_and_notes():
    assert str(Table([], heading=("site", "path"))) == "site  path"
    assert str(Table([])) == ""
    assert str(Table([], notes=("nothing",))) == "nothing"


def test_cells_of_html_are_escaped_and_numbers_stand_right():
    text = TABLE.to_html()
    assert '<th style="text-align: right">share</th></tr></thead>' in text
    assert "thead" not in Table([("no", "heading")]).to_html()
    assert "<td>" not in text
    assert '<td style="text-align: left">:smile: &lt;b&gt;</td><td style="text-align: right">12.25</td>' in text
    assert text.endswith("<p>one inline</p>")


def test_the_width_is_that_of_the_terminal_and_unlimited_elsewhere(monkeypatch):
    assert terminal_width() is None
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "33")
    assert terminal_width() == 33
    assert max(map(len, str(TABLE).splitlines())) <= 33
    monkeypatch.setattr("sys.stdout", None)
    assert terminal_width() is None


def test_sites_are_shown_as_a_table_in_text_and_in_notebooks():
    site = Site(kind="feed_forward", index=0, path="blocks.0.ff", width=16, hidden=64, activation="gelu")
    sites = Sites([site], notes=["nothing else"])
    assert str(sites) == (
        "site             path         width  heads  hidden\n"
        "feed_forward[0]  blocks.0.ff  16            64\n"
        "nothing else"
    )
    assert repr(sites) == f"Sites(1)\n{sites}"
    assert '<td style="text-align: left">feed_forward[0]</td>' in sites._repr_html_()


def test_a_value_without_a_table_says_so():
    with pytest.raises(tables.GraftError, match="Tabular has no table"):
        str(Tabular())
