"""Metrics against scipy, timing, memory, cost, locality and pictures."""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

import diffusers_graft as dg
from benchmarks import models
from benchmarks.rows import read_rows, write_row
from diffusers_graft.cli.main import main
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.core.sites import Site
from diffusers_graft.errors import FileError, GraftError, StateError
from diffusers_graft.evaluation.benchmark import PeakMemory, benchmark, compare, table
from diffusers_graft.evaluation.cost import count_flops, count_parameters
from diffusers_graft.evaluation.locality import _Probe, locality, near_tokens
from diffusers_graft.evaluation.metrics.frechet_distance import FeatureStatistics, frechet_distance
from diffusers_graft.evaluation.operator_costs import operator_costs
from diffusers_graft.evaluation.plots import draw_locality

from ..inspection.models import inputs_of, tiny
from ..models import SCHEDULER, batches, predict, tiny_dit, tiny_pixart


@pytest.mark.parametrize(("n", "width"), [(50, 4), (30, 40), (500, 16), (9, 1)])
def test_frechet_distance_is_scipys(n, width):
    generator = torch.Generator().manual_seed(n)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    one = torch.randn(n, width, generator=generator, dtype=torch.float64)
    other = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mixing + 0.3
    a, b = FeatureStatistics.of(one), FeatureStatistics.of(other)
    c1, c2 = (np.atleast_2d(np.cov(features.numpy(), rowvar=False)) for features in (one, other))
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum().item() + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("features", [torch.zeros(1, 4), torch.zeros(4), torch.full((4, 4), float("nan"))])
def test_features_without_statistics(features):
    with pytest.raises(GraftError):
        FeatureStatistics.of(features)


def test_two_images_have_statistics_in_float64():
    assert FeatureStatistics.of(torch.randn(2, 4)).covariance.dtype == torch.float64


def test_features_of_different_widths():
    with pytest.raises(GraftError, match="4 and 5"):
        frechet_distance(FeatureStatistics.of(torch.randn(9, 4)), FeatureStatistics.of(torch.randn(9, 5)))


def test_compare_takes_turns_and_gives_ratios():
    calls = []
    rows = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4)
    assert "".join(calls) == "ab" * 5
    assert [row.name for row in rows] == ["a", "b"]
    assert rows[0].ratio == rows[0].low == rows[0].high == 1
    assert rows[1].low <= rows[1].ratio <= rows[1].high


def test_what_surrounds_a_run_is_not_timed():
    entered = []

    @contextmanager
    def slowly(name):
        entered.append(name)
        time.sleep(0.1)
        yield
        time.sleep(0.1)

    (row,) = compare({"a": lambda: None}, rounds=2, around=slowly)
    assert entered == ["a"] * 3
    assert row.seconds < 0.1


def test_latency_of_grafts_leaves_the_model_alone():
    model = tiny_dit()
    before = predict(model)
    rows = benchmark(model, {"hyena_x": {"self_attention[:]": "hyena_x"}}, [8, 16], rounds=3, progress=False)
    assert [(row["tokens"], row["name"]) for row in rows] == [
        (16, "original"),
        (16, "hyena_x"),
        (64, "original"),
        (64, "hyena_x"),
    ]
    assert model.graft is None
    assert torch.equal(predict(model), before)


def test_depth_operations_and_time_are_told_apart():
    model = tiny_dit()
    rows = benchmark(
        model,
        {"pairs": "block_pair[:]=parallel(merge='sum')", "removed": "block[1::2]=remove"},
        [8],
        rounds=2,
        progress=False,
    )
    original, pairs, removed = rows
    assert [row["depth"] for row in rows] == [4, 2, 2]
    assert pairs["flops"] == original["flops"] > removed["flops"]
    assert pairs["parameters"] == original["parameters"] > removed["parameters"]
    assert all(row["milliseconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "rounds", "words"),
    [("original", 2, "Give these rules another name"), ("grafted", 1, "2 rounds or more; got 1")],
)
def test_benchmarks_that_would_say_nothing_are_refused(name, rounds, words):
    with pytest.raises(GraftError, match=words):
        benchmark(tiny_dit(), {name: "self_attention[0]=hyena_x"}, [8], rounds=rounds, progress=False)


def test_too_few_rounds_are_no_operators_refusal():
    with pytest.raises(GraftError, match="got 0"):
        operator_costs([dg.operators.configure("hyena_x")], grid=Grid(height=8, width=8), width=16, heads=2, rounds=0)


def test_peak_memory_counts_what_is_alive():
    with PeakMemory() as memory:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500)
        kept.add_(1)
    assert memory.peak == 4 * 1500


@pytest.mark.parametrize("model", [tiny_dit(), tiny_pixart()], ids=["dit", "pixart"])
def test_flops_of_a_self_graft_are_the_originals(model):
    """The operators' own prices, and torch's counter for the rest, make what the counter makes of the original."""
    original = count_flops(model)
    model.set_graft({"self_attention[:]": "self_attention", "feed_forward[:]": "mlp"})
    assert count_flops(model) == original
    model.unset_graft()
    model.set_graft({"self_attention[:]": "neighborhood", "feed_forward[0]": {"operator": "mlp", "expansion": 6}})
    attention = 4 * 16 * (16 - 9) * 16 * len(model.transformer_blocks)
    assert count_flops(model) == original - attention + 4 * 16 * 16 * 32
    model.unset_graft()
    model.set_graft({"self_attention[0]": "hyena_x"})
    (operator,) = model.graft.operators().values()
    assert count_flops(model) == original - 4 * 16 * 16 * 16 + operator.flops(16)
    assert not operator._forward_hooks
    assert not operator._forward_pre_hooks


def test_flops_of_linear_attention_on_a_prompt():
    """16 queries, 12 keys, 2 heads of 8, 3 layers: two products with the state and one with its normaliser."""
    model = tiny_pixart()
    original = count_flops(model)
    model.set_graft({"cross_attention[:]": "linear_attention"})
    assert count_flops(model) == original + 3 * 2 * (2 * 12 * 8 * 8 + 2 * 16 * 8 * 8 + 2 * 16 * 8 - 4 * 16 * 12 * 8)


def test_flops_of_pooled_keys_where_the_stride_does_not_divide_the_grid():
    """9 queries of width 16 on a grid of 3 x 3, whose keys and values become 2 x 2."""
    model, inputs = (
        tiny_dit(),
        {"timestep": torch.ones(1, dtype=torch.long), "class_labels": torch.zeros(1, dtype=torch.long)},
    )
    inputs["hidden_states"] = torch.zeros(1, 1, 6, 6)
    original = count_flops(model, inputs)
    model.set_graft({"self_attention[0]": "pooled_keys"})
    assert count_flops(model, inputs) == original - 4 * 9 * 9 * 16 + 4 * 9 * 4 * 16 + 2 * 2 * 4 * 4 * 16


@pytest.mark.parametrize(
    ("operator", "flops"),
    [
        ("neighborhood", 4 * 36 * 27 * 16),
        ({"operator": "hybrid", "first": "neighborhood", "second": "identity", "split": 1}, 4 * 36 * 27 * 8),
        (
            {"operator": "hybrid", "first": "pooled_keys", "second": "identity", "split": 1},
            4 * 3 * 2 * 2 * (36 + 4) * 8,
        ),
    ],
    ids=str,
)
def test_flops_on_a_video(operator, flops):
    """36 tokens of width 16 in 3 frames of 3 x 4: windows of 27 tokens, and 3 x 2 x 2 pooled keys."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
    )
    inputs = {
        "hidden_states": torch.zeros(1, 4, 3, 3, 4),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(1, 2, 8),
    }
    original = count_flops(model, inputs)
    model.set_graft({"self_attention[0]": operator})
    assert count_flops(model, inputs) == original - 4 * 36 * 36 * 16 + flops


@pytest.mark.parametrize(
    "name",
    [
        "FluxTransformer2DModel",
        "LatteTransformer3DModel",
        "PixArtTransformer2DModel",
        "ZImageTransformer2DModel",
        "PriorTransformer",
    ],
)
def test_flops_of_a_self_graft_are_the_originals_whatever_an_attention_is_given(name):
    """A prompt beside the image, the frames of one place, keys of a prompt alone, a list of images, tokens on no grid."""
    model = tiny(name)
    original = count_flops(model, inputs_of(name))
    model.set_graft(
        {site.address: "self_attention" for site in dg.find_sites(model) if site.kind.endswith("attention")}
    )
    assert count_flops(model, inputs_of(name)) == original


def test_parameters_that_run():
    model = tiny_dit()
    before = count_parameters(model)
    model.set_graft({"feed_forward[0]": {"operator": "mlp", "expansion": 6}})
    assert count_parameters(model) == before + 2 * 16 * 32 + 32


def test_the_forward_benchmark_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "SHAPE", {**models.SHAPE, "attention_head_dim": 8, "num_layers": 1})
    path = tmp_path / "tables" / "forward.md"
    assert main(["bench", "--operators", "identity", "--sizes", "4", "--rounds", "2", "--output", str(path)]) == 0
    assert capsys.readouterr().out.strip() in path.read_text()
    with pytest.raises(GraftError, match="hold no patch of 2 x 2"):
        benchmark(tiny_dit(), {}, [1], rounds=2, progress=False)


def test_a_benchmark_starts_from_the_original():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    with pytest.raises(StateError, match="unset_graft"):
        benchmark(model, {}, [8], rounds=2, progress=False)


def test_half_a_row_is_cut_off_and_other_lines_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    first = write_row(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": ')
    assert read_rows(path) == [first]
    second = write_row(path, {"a": 2})
    assert read_rows(path) == [first, second]
    for line in ("no row", "[1]"):
        path.write_text(f"{line}\n")
        with pytest.raises(FileError, match="Give another --output"):
            read_rows(path)


def test_near_tokens():
    band, window = near_tokens(Grid(height=3, width=3), 2, 3)
    assert band[4].tolist() == [False, False, True, True, True, True, True, False, False]
    assert window[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
    assert window[4].all()
    assert near_tokens(Grid(height=1, width=7), 0, 5)[1][3].tolist() == [False, *[True] * 5, False]


@pytest.mark.parametrize("additive", [False, True])
def test_the_probe_is_softmax_under_masks_and_scales(additive):
    site = Site(kind="self_attention", index=0, path="", width=8, heads=2, head_width=4)
    probe, (query, key, value) = _Probe.Config(band=0, kernel=1).build(site), torch.randn(3, 2, 2, 9, 4)
    hidden = torch.arange(9) == 8
    mask = torch.zeros(9).masked_fill(hidden, -torch.inf) if additive else ~hidden
    mixed = probe(query, key, value, Context(grid=Grid(height=3, width=3), mask=mask.expand(9, 9), scale=0.1))
    mass = (0.1 * query @ key.transpose(-1, -2)).masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(mixed, mass @ value)
    torch.testing.assert_close(probe.shares[0], mass.diagonal(dim1=-2, dim2=-1).mean(-1).expand(2, 2, 2))


def test_locality_against_attention_by_hand(tmp_path):
    model = tiny_dit(num_layers=1)
    seen = {}
    attention = model.transformer_blocks[0].attn1
    attention.register_forward_pre_hook(lambda m, a: seen.update(hidden=a[0]))
    before = predict(model)
    rows = locality(model, batches(1), noise_scheduler=SCHEDULER, band=1, kernel=3)
    query, key = (
        layer(seen["hidden"]).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (attention.to_q, attention.to_k)
    )
    mass = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    band, window = near_tokens(Grid(height=4, width=4), 1, 3)
    torch.testing.assert_close(rows[0].band, (mass * band).sum(-1).mean((0, 2)))
    torch.testing.assert_close(rows[0].neighborhood, (mass * window).sum(-1).mean((0, 2)))
    assert rows[0].uniform_band == pytest.approx(46 / 256)
    assert torch.equal(predict(model), before)
    draw_locality(tmp_path / "locality.png", rows, band=1, kernel=3)
    assert (tmp_path / "locality.png").stat().st_size > 5000


def test_locality_is_of_the_original():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    with pytest.raises(StateError, match="a property of the original"):
        locality(model, batches(1), noise_scheduler=SCHEDULER)


def test_locality_weighs_samples_alike_and_looks_under_masks():
    name = "PixArtTransformer2DModel"
    model, (batch,) = tiny_dit(), batches(1, size=3)
    inputs = {"hidden_states": batch["sample"], "timestep": torch.arange(3), "class_labels": batch["class_labels"]}
    parts = [{key: value[some] for key, value in inputs.items()} for some in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(locality(model, parts, band=1)[0].band, locality(model, [inputs], band=1)[0].band)
    model, inputs = tiny(name), inputs_of(name)
    tokens = inputs["hidden_states"][0, 0].numel() // model.config.patch_size**2
    inputs["attention_mask"] = torch.arange(tokens).expand(len(inputs["hidden_states"]), -1) == 0
    (row, *_) = locality(model, [inputs], band=tokens, kernel=1)
    torch.testing.assert_close(
        row.neighborhood, torch.full_like(row.neighborhood, 1 / tokens)
    )  # all look at the first token


@pytest.mark.parametrize(
    ("name", "other"), [("Lumina2Transformer2DModel", "context_refiner"), ("LatteTransformer3DModel", "temporal")]
)
def test_locality_leaves_out_what_runs_on_other_tokens(name, other):
    rows = locality(tiny(name), [inputs_of(name)])
    assert rows
    assert not [row for row in rows if row.site.path.startswith(other)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"batches": []}, "no batches"), ({"kernel": 4}, "a kernel is odd"), ({"band": -1}, "from 0")],
)
def test_locality_of_nothing_is_refused(settings, words):
    with pytest.raises(GraftError, match=words):
        locality(tiny_dit(), **{"batches": batches(1), "noise_scheduler": SCHEDULER, **settings})


def test_tables():
    assert table([["a", "b"], ["long", "1"]]).splitlines()[2] == "long  1"
    with pytest.raises(GraftError):
        table([])


@dataclass
class Answer:
    samples: int = 7

    def __call__(self, model):
        return {"answer": 42.0}


def test_scores_as_data():
    scores = dg.evaluate(tiny_dit(), batches(1), noise_scheduler=SCHEDULER, metrics=[Answer()])
    assert scores["answer"] == 42
    assert set(scores.to_dict()) == {"values", "protocol"}
    assert scores.protocol == {"samples": 8, "seed": 0, "noise_scheduler": "DDPMScheduler", "Answer.samples": 7}
    assert "answer 42" in str(scores)


def test_the_denoising_loss_is_the_mean_over_samples():
    model = tiny_dit()
    inputs = {"hidden_states": torch.randn(3, 1, 8, 8), "timestep": torch.arange(3), "class_labels": torch.arange(3)}
    batch = {**inputs, "target": torch.randn(3, 1, 8, 8)}
    scores = dg.evaluate(
        model, [{name: value[some] for name, value in batch.items()} for some in (slice(0, 1), slice(1, 3))]
    )
    with torch.no_grad():
        assert scores["denoising_loss"] == pytest.approx(F.mse_loss(model(**inputs).sample, batch["target"]).item())
    assert scores.protocol == {"samples": 3, "seed": 0}


@pytest.mark.parametrize("measure", [dg.evaluate, locality])
def test_what_is_measured_is_told_every_label(measure):
    model, (batch,), seen = tiny_dit(), batches(1, size=64), {}
    model.register_forward_pre_hook(lambda model, args, kwargs: seen.update(kwargs), with_kwargs=True)
    measure(model, [batch], noise_scheduler=SCHEDULER)
    assert torch.equal(seen["class_labels"], batch["class_labels"])


class LearnedQueries(ModelMixin, ConfigMixin):
    """A model whose part is given a view of a parameter, as the perceiver of Bria's second Fibo."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.queries, self.part = nn.Parameter(torch.zeros(4, 8)), nn.Linear(8, 8)

    def forward(self, sample):
        return sample + self.part(self.queries[:2].unsqueeze(0).expand(3, -1, -1))


def test_views_of_parameters_are_counted():
    assert count_flops(LearnedQueries(), {"sample": torch.zeros(3, 2, 8)}) == 2 * 3 * 2 * 8 * 8
