"""Grids and contexts: which tokens a part gets, and which context a thread reads."""

import copy
import threading

import pytest
import torch

from diffusers_graft.core.context import Context, ContextSlot, Grid
from diffusers_graft.core.sites import AttentionSite
from diffusers_graft.errors import GeometryError

SITE = AttentionSite(kind="self_attention", index=0, path="blocks.0.attn", width=8, heads=2, head_width=4)
REFINER = AttentionSite(kind="self_attention", index=1, path="refiner.0.attn", width=8, heads=2, head_width=4)


@pytest.mark.parametrize(
    "sides", [{"height": 0, "width": 4}, {"height": -4, "width": -4}, {"frames": 0, "height": 4, "width": 4}], ids=str
)
def test_a_grid_has_tokens_on_every_side(sides):
    with pytest.raises(GeometryError, match="1 or more tokens on every side"):
        Grid(**sides)


def test_places_are_in_raster_order_with_the_last_axis_fastest():
    grid = Grid(frames=2, height=3, width=4)
    assert grid.tokens == 24
    assert [grid.place_of(token) for token in (0, 3, 4, 12, 23)] == [
        (0, 0, 0),
        (0, 0, 3),
        (0, 1, 0),
        (1, 0, 0),
        (1, 2, 3),
    ]
    assert Grid(height=3, width=4).place_of(5) == (1, 1)
    assert (str(grid), str(Grid(height=3, width=4))) == ("2 x 3 x 4", "3 x 4")


def test_a_part_that_mixes_one_frame_gets_its_grid():
    context = Context(grid=Grid(frames=3, height=4, width=5))
    assert context.at(SITE, 60) is context
    assert context.at(SITE, 20).grid == Grid(height=4, width=5)
    assert context.at(SITE, 7) is context


def test_levels_of_a_pyramid_are_halved_and_rounded_up():
    context = Context(grid=Grid(height=5, width=9), pyramid=True)
    assert context.at(SITE, 15).grid == Grid(height=3, width=5)
    assert context.at(SITE, 6).grid == Grid(height=2, width=3)
    assert context.at(SITE, 7) is context
    assert Context(grid=Grid(height=5, width=9)).at(SITE, 15).grid == Grid(height=5, width=9)


def test_a_part_on_another_sequence_has_no_grid():
    context = Context(grid=Grid(height=4, width=5), aside=("refiner.",), text_first=True, references=3)
    alone = context.at(REFINER, 7)
    assert (alone.grid, alone.text_first, alone.references) == (None, None, 0)
    assert context.at(SITE, 7) is context


def test_a_grid_that_is_missing_or_of_other_tokens_is_refused():
    with pytest.raises(GeometryError, match="mixer needs to know how tokens lie .* Call the model itself"):
        Context().require_grid("mixer", 4)
    with pytest.raises(GeometryError, match="mixer was given 5 tokens, but the grid is 2 x 2 = 4"):
        Context(grid=Grid(height=2, width=2)).require_grid("mixer", 5)


def test_every_thread_reads_the_context_of_its_forward():
    slot = ContextSlot()
    one = Context(text_tokens=1)
    other = Context(text_tokens=2)
    seen = []

    def forward():
        slot.current = other
        seen.append(slot.current)

    slot.current = one
    thread = threading.Thread(target=forward)
    thread.start()
    thread.join()
    assert seen == [other]
    assert slot.current is one
    # A thread that ran no forward, as in the backward pass, reads the last of all.
    reader = threading.Thread(target=lambda: seen.append(slot.current))
    reader.start()
    reader.join()
    assert seen[-1] is other


def test_what_an_attention_was_given_is_added_to_the_context():
    slot = ContextSlot()
    slot.current = Context(text_tokens=3)
    mask = torch.ones(2, 2, dtype=torch.bool)
    context = slot.with_attention(mask=mask, scale=0.5, causal=True)
    assert (context.text_tokens, context.scale, context.causal) == (3, 0.5, True)
    assert context.mask is mask
    assert slot.current.mask is None


def test_attention_without_a_backend_is_torch_s_and_with_one_is_called():
    query = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, scale=0.3)
    assert torch.equal(Context().attend(query, query, query, scale=0.3), expected)
    context = Context(softmax=lambda query, key, value, **settings: settings)
    assert context.attend(query, query, query, causal=True) == {"attn_mask": None, "scale": None, "is_causal": True}


def test_a_slot_can_be_copied():
    slot = ContextSlot()
    slot.current = Context(grid=Grid(height=2, width=2))
    assert copy.deepcopy(slot).current == slot.current
