"""Write an operator of one's own in a script, check it, train it and save a graft that others can read.

    python examples/own_operator.py [folder]

The operator lets every token look at a few tokens that follow it in the picture's rows. Shared on the Hub by itself:
`dg.hub.push_operator("row_window", "me/row-window", license="apache-2.0")`.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.operators import Mixer
from diffusers_graft.testbed.sampling import scheduler


@dg.operators.register
class RowWindow(Mixer):
    """Softmax over the tokens that are at most `reach` places away in the same row."""

    name = "row_window"
    needs_grid = True  # it must know where a row ends

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings of the window.

        Attributes:
            reach: places to either side.
        """

        reach: int = 3

    def forward(self, query, key, value, context):
        grid = context.require_grid(self.name, value.shape[2])
        rows, columns = self.places(grid.tokens, grid.width, query.device)
        is_near = (columns[:, None] - columns).abs() <= self.config.reach
        is_seen = is_near & (rows[:, None] == rows)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=is_seen, scale=context.scale)

    @staticmethod
    def places(tokens: int, width: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Return row and column of every token."""
        index = torch.arange(tokens, device=device)
        return index // width, index % width

    def receptive_field(self, token, grid):
        rows, columns = self.places(grid.tokens, grid.width)
        is_seen = (rows == rows[token]) & ((columns - columns[token]).abs() <= self.config.reach)
        return set(is_seen.nonzero().flatten().tolist())

    def flops(self, tokens):
        return 4 * tokens**2 * self.site.inner_width  # as dense as softmax: the mask hides, and saves nothing


def main(folder: str = "my-own-operator", steps: int = 200) -> None:
    sys.stdout.write(f"{dg.check_operator('row_window')}\n\n")
    model = testbed.load()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[1::2]": "row_window(reach=2)"}))
    batches = testbed.letter_batches(32, seed=0)
    config = dg.DistillConfig(steps=steps, lr=2e-3, warmup=steps // 10)
    dg.distill(model, graft, batches, config, noise_scheduler=scheduler())
    model.set_graft(graft)
    # The operator's source goes along; it runs for those who pass trust_remote_code=True.
    model.save_graft(folder, self_contained=True)
    sys.stdout.write(f"{model.graft.plan}\n{folder} has the graft and graft_operator_row_window.py.\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
