"""The replay buffer of stage one."""

import pytest
import torch

from diffusers_graft.errors import TrainingError
from diffusers_graft.training.distill import replay_buffer

from ...models import tiny_dit
from ..runs import (
    HYENA,
    calls_of,
    run_distill,
)


@pytest.mark.parametrize("free", [10**9, 200_000])
def test_the_buffer_takes_half_of_the_free_memory_by_default(free, monkeypatch):
    """Sites learn together where there is room, and in groups, each with its own passes of the teacher, where there is
    not.
    """
    pages = {"SC_AVPHYS_PAGES": free, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(replay_buffer.os, "sysconf", pages.get)
    assert replay_buffer.usable_memory(torch.device("cpu")) == free // 2
    model = tiny_dit()
    counts = calls_of(model)
    one_call = 2 * 8 * 16 * 16 * 4  # input and output of 8 samples of 16 tokens of width 16, in float32
    together = min(4, free // 2 // (4 * one_call))
    _, _, reports = run_distill({"self_attention[:]": HYENA}, model, steps=8, reuse=2, ring=4)
    assert all(len(report.losses) == 8 for report in reports.values())
    assert counts[0] == 1 + 4 * (4 // together)


def test_a_system_without_a_figure_of_its_memory_asks_for_a_limit(monkeypatch):
    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(replay_buffer.os, "sysconf", unknown)
    with pytest.raises(TrainingError, match=r"set DistillConfig\.memory"):
        run_distill({"self_attention[0]": HYENA}, reuse=2)
    run_distill({"self_attention[0]": HYENA}, reuse=2, memory=10**6)
