"""Sites of every kind as data: built, saved, read back, refused."""

import copy
import dataclasses

import pytest

import diffusers_graft as dg
from diffusers_graft.core.sites import KINDS, AttentionSite, BlockSite, FeedForwardSite, Site, Sites
from diffusers_graft.errors import FileError, UnknownNameError

ATTENTION = AttentionSite(kind="joint_attention", index=3, path="blocks.3.attn", width=24, heads=3, head_width=16)
FEED_FORWARD = FeedForwardSite(kind="feed_forward", index=0, path="b.0.ff", width=8, hidden=32, activation="gelu")
RUN = BlockSite(kind="block_run", index=2, path="blocks.2", width=8, blocks=3, streams=2)
ALL = [ATTENTION, FEED_FORWARD, RUN]


def test_every_kind_has_one_class():
    classes = (AttentionSite, FeedForwardSite, BlockSite)
    assert sorted(kind for site_class in classes for kind in site_class.kinds) == sorted(KINDS)


@pytest.mark.parametrize("site", ALL, ids=lambda site: site.kind)
def test_the_base_class_makes_a_site_of_the_class_of_its_kind(site):
    assert dg.Site(**site.to_dict()) == site
    assert type(dg.Site(**site.to_dict())) is type(site)


@pytest.mark.parametrize("site", ALL, ids=lambda site: site.kind)
def test_a_site_is_data(site):
    assert Site.from_dict(site.to_dict()) == site
    assert copy.deepcopy(site) == site
    assert dataclasses.replace(site, index=1).index == 1
    assert hash(site) == hash(copy.copy(site))


def test_what_is_saved_of_a_site_has_its_sizes_and_no_others():
    assert list(FEED_FORWARD.to_dict()) == ["kind", "index", "path", "width", "hidden", "activation"]


def test_addresses_and_paths():
    assert (ATTENTION.address, ATTENTION.paths) == ("joint_attention[3]", ("blocks.3.attn",))
    assert (RUN.address, RUN.paths) == ("block_run[2:5]", ("blocks.2", "blocks.3", "blocks.4"))
    assert ATTENTION.inner_width == 48


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": None}, "of another type than they are written with: heads"),
        ({"heads": 2.0}, "heads"),
        ({"index": True}, "index"),
        ({"path": 3}, "path"),
        ({"hidden": 3}, "unknown entries"),
        ({"width": -1}, "sizes that no model has: width"),
        ({"head_width": 10**10}, "sizes that no model has: head_width"),
    ],
)
def test_entries_that_no_such_site_has_are_refused(change, words):
    with pytest.raises(FileError, match=words):
        Site.from_dict({**ATTENTION.to_dict(), **change})


def test_a_size_that_is_missing_is_named():
    data = FEED_FORWARD.to_dict()
    del data["hidden"]
    with pytest.raises(FileError, match="lacks entries, .*: hidden"):
        Site.from_dict(data)


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'self_attention'"):
        Site(kind="self_atention", index=0, path="", width=1)
    with pytest.raises(UnknownNameError, match="no kind 'feed_forward'"):
        AttentionSite(kind="feed_forward", index=0, path="", width=1, heads=1, head_width=1)
    with pytest.raises(UnknownNameError, match="no kind 'block '"):
        Sites(ALL).where(kind="block ")


def test_a_slice_of_sites_is_sites():
    sites = Sites(ALL)
    assert sites[1:] == Sites([FEED_FORWARD, RUN])
    assert sites[0] is ATTENTION
    assert sites.where(kind="feed_forward") == Sites([FEED_FORWARD])
    assert hash(sites[:]) == hash(sites)
    assert len(sites) == 3
