"""Classes read from their source."""

from torch import nn

from diffusers_graft.inspection.source import (
    calls_of,
    is_causal,
    names_used,
    order_of_use,
    parameters_of,
    passes_another_sequence,
    returned_names,
    takes_one_tensor,
    text_comes_first,
    tree_of,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.never_called = nn.Identity()

    def forward(self, hidden_states, encoder_hidden_states=None, *, scale=1):
        hidden_states = self.attn(hidden_states, encoder_hidden_states)
        for first, second in zip(self.ones, self.others):  # noqa: B905
            hidden_states = second(first(hidden_states))
        hidden_states = self.twice(hidden_states, hidden_states)
        hidden_states = self.alone(hidden_states)
        hidden_states = self.maybe(hidden_states, encoder_hidden_states if scale else None)
        getattr(self, "by_text")(hidden_states)  # noqa: B009
        return hidden_states, encoder_hidden_states


def attend(hidden_states, encoder_hidden_states=None):
    """Stands for the forward of an attention."""


class Joined:
    def __call__(self, attn, img_query, txt_query):
        def inner():
            return 3

        query = torch.cat([txt_query, img_query], dim=1)  # noqa: F821
        return attn(query, is_causal=True), inner


class Single:
    def __call__(self, attn, query):
        return attn(query, is_causal=False)


def test_children_are_ranked_by_their_first_use_and_zipped_ones_together():
    order = order_of_use(Block)
    assert order["ones"] == order["others"]
    names = ["attn", "ones", "twice", "alone", "maybe"]
    assert sorted(names, key=order.__getitem__) == names
    assert "never_called" not in order


def test_a_second_sequence_is_seen_unless_it_depends():
    assert passes_another_sequence(Block, "attn", attend) is True
    assert passes_another_sequence(Block, "twice", attend) is False
    assert passes_another_sequence(Block, "alone", attend) is False
    assert passes_another_sequence(Block, "maybe", attend) is None
    assert passes_another_sequence(Block, "never_called", attend) is None


def test_calls_of_one_tensor():
    assert [takes_one_tensor(call) for call in calls_of(Block, "alone")] == [True]
    assert [takes_one_tensor(call) for call in calls_of(Block, "twice")] == [False]


def test_names_that_methods_use_include_texts_and_leave_out_the_constructor():
    names = names_used(Block)
    assert {"attn", "ones", "by_text"} <= names
    assert "never_called" not in names


def test_what_a_forward_takes_and_returns():
    assert parameters_of(Block) == ("hidden_states", "encoder_hidden_states", "scale")
    assert returned_names(Block) == {("hidden_states", "encoder_hidden_states")}


def test_where_a_processor_puts_the_prompt_and_whether_it_is_causal():
    assert text_comes_first(Joined) is True
    assert text_comes_first(Single) is None
    assert is_causal(Joined)
    assert not is_causal(Single)


def test_without_source_nothing_is_known():
    hidden = {}
    exec("class Hidden:\n    def forward(self, x):\n        return x\n", hidden)
    assert tree_of(hidden["Hidden"].forward) is None
    assert parameters_of(hidden["Hidden"]) == ()
    assert returned_names(hidden["Hidden"]) == frozenset()
    assert names_used(hidden["Hidden"]) is None
