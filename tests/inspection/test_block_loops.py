"""What a loop over blocks passes to them."""

import pytest
from torch import nn

from diffusers_graft.inspection.block_loops import find_separation, read_from_outside


class Block(nn.Module):
    def forward(self, states, temb=None, number=None):
        return states


class Same(nn.Module):
    def forward(self, states, temb, cache=None):
        for block in self.blocks:
            states = block(states, temb)
        for index, block in enumerate(self.cached):
            layer = cache[index] if cache is not None else None
            states = block(states, temb, number=layer)
        return states


class Different(nn.Module):
    def forward(self, states, temb):
        for index, block in enumerate(self.blocks):
            shift = temb[index]
            moved = shift + 1
            states = block(states, moved)
        return states


class Checkpointed(nn.Module):
    def forward(self, states, temb):
        for index, block in enumerate(self.blocks):
            states = self.checkpoint(block, states, number=index)
        return states


class Between(nn.Module):
    def forward(self, states):
        for block, adapter in zip(self.blocks, self.adapters):  # noqa: B905
            states = adapter(block(states))
        return states


class Outside(nn.Module):
    def forward(self, states):
        emb = self.blocks[0].norm1.emb(states)
        for block in self.blocks:
            states = block(states) + block.scale
        return emb + states


@pytest.mark.parametrize("name", ["blocks", "cached"])
def test_blocks_that_get_the_same_are_neighbours(name):
    assert find_separation(Same, name, Block, ("states",)) is None


@pytest.mark.parametrize(
    ("holder", "words"),
    [
        (Different, "each Block gets its own temb, so neighbours cannot get the same input"),
        (Checkpointed, "each Block gets its own number, so neighbours cannot get the same input"),
        (Between, "adapters run between them"),
    ],
)
def test_blocks_that_get_something_of_their_turn_are_separate(holder, words):
    assert find_separation(holder, "blocks", Block, ("states",)) == words


def test_what_the_model_reads_of_a_block_is_named_to_its_end():
    assert read_from_outside(Outside(), "blocks.0") == {("norm1", "emb"), ("scale",)}
    assert read_from_outside(Outside(), "blocks.1") == {("scale",)}
