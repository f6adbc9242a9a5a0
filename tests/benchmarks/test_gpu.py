"""What `make gpu` runs, as a miniature on the CPU; and what it says where there is no GPU."""

import dataclasses
import re

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import main
from diffusers_graft.core.context import Grid
from diffusers_graft.errors import GraftError

TINY = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, patch_size=2, in_channels=4)
SIZES = gpu.Sizes(
    device="cpu",
    names=("sliding_window", "mlp"),
    video_names=("hyena_x(layout='3d', kernel_size=3)",),
    widths=(8,),
    compiler="eager",
    pixart_shape={**TINY, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 8},
    layers={"1 of 2": "1:"},
    mixers=("identity_uncopied", "sliding_window(window=(99, 99))"),
    softmax=(),
    video=Grid(frames=3, height=4, width=4),
    heads=2,
    head_width=8,
    on_video=("radial", "neighborhood(kernel=9)"),
    dit_shape={**TINY, "out_channels": 4, "num_embeds_ada_norm": 10},
    batch=2,
    steps=2,
    rounds=2,
)


def test_everything_lands_in_one_file(tmp_path):
    output = tmp_path / "gpu.md"
    gpu.bench_gpu(output, SIZES, say=lambda text: None)
    text = output.read_text(encoding="utf-8")
    for line in (
        "sliding_window +float32 and the CPU's float64",
        "mlp +compiled, bf16",
        "sliding_window +auto, heads of 8",
        r"hyena_x\(layout='3d', kernel_size=3\) +auto, heads of 8",
    ):
        assert re.search(line + r".* right", text), line
    assert "refused" in text  # flash-attn is for GPUs
    assert "identity_uncopied" in text
    assert "sliding_window(window=(99, 99)): GeometryError" in text
    assert "radial" in text
    assert "GeometryError: neighborhood" in text
    assert "hyena_x in half of them, 2 steps of 2 samples" in text


CHECKED = [{"names": (name,), "video_names": ()} for name in gpu.SETTINGS]
CHECKED += [{"names": (), "video_names": (name,)} for name in gpu.VIDEO_SETTINGS]


@pytest.mark.long
@pytest.mark.parametrize("names", CHECKED, ids=str)
def test_settings_that_leave_something_out_are_checked_too(names):
    failures = []
    table = gpu.operator_table(dataclasses.replace(SIZES, **names), lambda: True, failures)
    assert not failures
    (name,) = (*names["names"], *names["video_names"])
    assert f"{name}  " in table


def test_without_time_what_was_left_out_is_named(tmp_path):
    failures = []
    table = gpu.operator_table(SIZES, lambda: False, failures)
    assert "No time was left for: sliding_window, mlp, hyena_x(layout='3d', kernel_size=3)." in table
    assert "no time left" in gpu.video_table(SIZES, lambda: False)
    assert not failures


def test_a_wrong_backend_fails_the_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_difference", lambda one, other: 0.5)
    monkeypatch.setattr(gpu, "pixart_part", lambda sizes, is_time_left: "")
    monkeypatch.setattr(gpu, "training_table", lambda sizes: 1 / 0)
    with pytest.raises(GraftError, match="(?s)Stages one and two: ZeroDivisionError.*mlp, compiled, bf16: WRONG"):
        gpu.bench_gpu(tmp_path / "gpu.md", SIZES, say=lambda text: None)
    assert "Failed: ZeroDivisionError" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert main(["gpu", "--output", str(tmp_path / "gpu.md")]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
