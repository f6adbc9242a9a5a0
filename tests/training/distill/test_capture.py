"""Captured calls of the original parts."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.inspection import example_inputs
from diffusers_graft.training.previews import Preview

from ...models import tensors_of, tiny_dit, tiny_pixart
from ..runs import RANDOM


@pytest.mark.parametrize("make", [tiny_dit, tiny_pixart])
def test_gated_outputs_are_compared_as_the_block_adds_them(make):
    """By hand: the difference of the block's stream before and after the part, on the first step."""
    model = make()

    inputs = example_inputs(model, batch_size=4)
    rules = {"self_attention[1]": RANDOM, "feed_forward[1]": {"operator": "mlp", "init": "random"}}
    graft = dg.build_graft(model, dg.plan_graft(model, rules))
    block, added = model.transformer_blocks[1], {}

    def stream(part):
        """What the block adds for one part: its output with the part, less that with the part's answer taken away."""
        outputs = []
        for keep in (1, 0):
            handle = part.register_forward_hook(lambda m, a, out, keep=keep: out * keep)
            capture = []
            other = block.register_forward_hook(lambda m, a, out, capture=capture: capture.append(out))
            with torch.no_grad():
                model(**inputs)
            handle.remove()
            other.remove()
            outputs.append(capture[0])
        return outputs[0] - outputs[1]

    added["feed_forward[1]"] = stream(block.ff)
    reports = dg.distill(
        model, graft, [inputs], dg.DistillConfig(steps=1, gated=True, progress=False, loss="l2", lr=1e-9)
    )
    with torch.no_grad():
        seat = graft.seats["transformer_blocks.1.ff"]
        model.transformer_blocks[1].ff, original = seat, block.ff
        grafted = stream(seat)
        model.transformer_blocks[1].ff = original
    expected = (grafted - added["feed_forward[1]"]).square().mean().item()
    assert reports["feed_forward[1]"].losses[0] == pytest.approx(expected, rel=1e-3)
    raw = dg.distill(
        model,
        dg.build_graft(model, graft.plan),
        [inputs],
        dg.DistillConfig(steps=1, progress=False, loss="l2", lr=1e-9),
    )
    assert raw["feed_forward[1]"].losses[0] != pytest.approx(expected, rel=0.2)


def test_a_pair_is_captured_from_the_firsts_input_to_the_seconds_output():
    model = tiny_dit(num_layers=2)
    graft = dg.build_graft(model, dg.plan_graft(model, "block_pair[0]=parallel"))
    calls = {}
    first, second = model.transformer_blocks
    hooks = [
        first.register_forward_pre_hook(lambda module, args: calls.update(given=args[0])),
        second.register_forward_hook(lambda module, args, output: calls.update(wanted=output)),
    ]
    from diffusers_graft.training.distill.capture import Capture

    watch, seen = Capture(model, graft), {}
    with watch.hooks():
        watch.run(example_inputs(model), graft.operators(), lambda path, call: seen.update({path: call}))
    for hook in hooks:
        hook.remove()
    (call,) = seen.values()
    assert call.args[0] is calls["given"]
    assert call.output is calls["wanted"]


class OtherSize(Preview):
    """Runs the grafted model on latents of another size, as drawing samples may."""

    def is_due(self, state):
        return True

    def show(self, model, state, trackers):
        inputs = example_inputs(model, batch_size=2)
        sample = inputs["hidden_states"]
        model(**{**inputs, "hidden_states": torch.cat([sample, sample], dim=3)})


def test_a_preview_of_another_size_moves_nothing_of_stage_one():
    def train(previews):
        model = tiny_pixart()
        inputs = example_inputs(model, batch_size=2)
        graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[1]": "neighborhood(kernel=1)"}))
        config = dg.DistillConfig(steps=3, warmup=0, lr=1e-2, progress=False)
        dg.distill(model, graft, [inputs] * 3, config, previews=previews)
        return tensors_of(graft.seats["transformer_blocks.1.attn1"])

    shown = train([OtherSize()])
    assert all(torch.equal(one, other) for one, other in zip(shown.values(), train([]).values(), strict=True))
