"""Grafts found by their tags, with what their cards measured."""

import pytest

import diffusers_graft as dg
from diffusers_graft.errors import FileError, GraftError

from ..serialization.fake_hub import Repository
from ..serialization.test_upload import hub, only_regular  # noqa: F401

CARD = """---
library_name: diffusers-graft
tags: [diffusers, diffusers-graft, graft, {operator}]
base_model: {base}
license: mit
model-index:
- name: x
  results:
  - task: {{type: text-to-image}}
    dataset: {{type: held-out, name: held-out}}
    metrics:
    - {{type: denoising_loss, value: 0.25, name: denoising loss (graft)}}
---
# A graft
"""


def publish(hub, repo_id, card):  # noqa: F811
    hub.repos[repo_id] = Repository()
    hub.repos[repo_id].commit("main", {"README.md": card.encode()})


@only_regular
def test_grafts_of_a_base_are_listed_with_what_their_cards_measured(hub):  # noqa: F811
    publish(hub, "owner/one", CARD.format(operator="hyena_x", base="a/base"))
    publish(hub, "owner/two", CARD.format(operator="mlp", base="b/base"))
    publish(hub, "owner/model", "---\ntags: [diffusers]\nbase_model: a/base\n---\n")
    found = dg.hub.search(base_model="a/base")
    assert [graft.repository for graft in found] == ["owner/one"]
    assert found[0].operators == ("hyena_x",)
    assert found[0].scores == {"denoising loss (graft)": 0.25}
    assert found[0].revision == hub.repos["owner/one"].refs["main"]
    assert "denoising loss (graft) 0.25" in str(found)
    assert "owner/one" in found._repr_html_()
    assert len(dg.hub.search()) == 2
    assert [graft.repository for graft in dg.hub.search(operator="mlp")] == ["owner/two"]


@only_regular
def test_finding_nothing_is_said_in_a_line(hub):  # noqa: F811
    found = dg.hub.search(base_model="a/base", operator="mlp")
    assert len(found) == 0
    assert str(found) == "There is no graft of a/base with mlp on the Hub. Ask for less, or make the first."


@only_regular
def test_a_card_with_nonsense_is_listed_without_it(hub):  # noqa: F811
    publish(
        hub, "owner/odd", "---\ntags: [diffusers-graft, graft]\nlibrary_name: diffusers-graft\nlicense: [1]\n---\n"
    )
    (graft,) = dg.hub.search()
    assert (graft.license, graft.base_model, graft.scores) == (None, None, {})


def test_without_a_network_it_is_a_line_in_words():
    with pytest.raises(FileError, match="The Hub could not be reached") as refusal:
        dg.hub.search()
    assert "\n" not in str(refusal.value)
    with pytest.raises(GraftError, match="from 1; got 0"):
        dg.hub.search(limit=0)
