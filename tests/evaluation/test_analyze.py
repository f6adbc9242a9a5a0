"""An analysis against attention, moments, fits and alignments by hand."""

import json
import subprocess
import sys

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.core.context import Grid
from diffusers_graft.core.sites import Site
from diffusers_graft.errors import FileError, GraftError, StateError, TrainingError
from diffusers_graft.evaluation import locality
from diffusers_graft.evaluation.activations import Moments
from diffusers_graft.evaluation.locality import measure_near_mass, near_tokens
from diffusers_graft.evaluation.redundancy import Alignment, BlockRecorder, _LinearFit
from diffusers_graft.evaluation.timestep_buckets import TimestepBuckets

from ..inspection.models import inputs_of, tiny
from ..models import SCHEDULER, batches, predict, tiny_dit


def closed_form_of_uniform(tokens, band):
    """sum_d (N - |d|) over |d| <= k, divided by N^2."""
    return (tokens * (2 * band + 1) - band * (band + 1)) / tokens**2


@pytest.mark.parametrize("band", [0, 3, 32])
def test_locality_of_uniform_and_diagonal_attention_is_the_closed_form(band):
    grid = Grid(height=8, width=8)
    zeros = torch.zeros(1, 2, 64, 64)
    uniform = measure_near_mass(zeros, zeros, grid, band=band, kernel=3)
    expected = closed_form_of_uniform(64, band)
    torch.testing.assert_close(uniform.shares[0], torch.full((1, 2), expected))
    assert uniform.uniform[0] == pytest.approx(expected)
    # Each query is its own key, and so large that the softmax is a diagonal.
    identity = 100 * torch.eye(64).expand(1, 2, 64, 64)
    diagonal = measure_near_mass(identity, identity, grid, band=band, kernel=1)
    torch.testing.assert_close(diagonal.shares, torch.ones(2, 1, 2))


@pytest.mark.parametrize(("width", "band"), [(2, 1), (4, 4), (5, 7)])
def test_locality_of_banded_attention_is_the_closed_form(width, band):
    """Attention uniform within |i - j| <= w has L_k = mean_i |within k| / |within w|."""
    tokens = 36
    index = torch.arange(tokens)
    distance = (index[:, None] - index).abs()
    mask = distance <= width
    query = torch.zeros(1, 1, tokens, 4)
    measured = measure_near_mass(query, query, Grid(height=6, width=6), band=band, kernel=1, mask=mask)
    expected = ((mask & (distance <= band)).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(measured.shares[0, 0, 0], expected)


@pytest.mark.parametrize("prompt", [0, 7])
def test_blocks_of_rows_are_the_naive_matrix(monkeypatch, prompt):
    grid = Grid(height=16, width=16)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 256, 8, generator=generator)
    key = torch.randn(2, 3, 256 + prompt, 8, generator=generator)
    mask = torch.rand(2, 1, 1, 256 + prompt, generator=generator) < 0.9
    monkeypatch.setattr(locality, "_ENTRIES", 2 * 3 * 256 * 50)  # blocks of 50 rows, the last one smaller
    measured = measure_near_mass(query, key, grid, band=32, kernel=5, mask=mask, scale=0.3)
    scores = (0.3 * query.double() @ key.double().transpose(-1, -2)).masked_fill(~mask, -torch.inf)
    mass = scores.softmax(-1)
    image = mass[..., :256]
    torch.testing.assert_close(measured.others.double(), 1 - image.sum(-1).mean(-1), atol=1e-6, rtol=0)
    rows = image / image.sum(-1, keepdim=True)
    for share, near in zip(measured.shares, near_tokens(grid, 32, 5), strict=True):
        torch.testing.assert_close(share.double(), (rows * near).sum((-1, -2)) / 256, atol=1e-6, rtol=0)


@pytest.mark.long
def test_locality_of_16384_tokens_stays_below_2_gb():
    """By the peak of a process that does nothing else."""
    program = (
        "import resource, torch\n"
        "from diffusers_graft.core.context import Grid\n"
        "from diffusers_graft.evaluation.locality import measure_near_mass\n"
        "query = torch.randn(1, 16, 16384, 72)\n"
        "mass = measure_near_mass(query, query, Grid(height=128, width=128), band=256, kernel=7)\n"
        "assert mass.shares.shape == (2, 1, 16)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 2e9


def test_moments_of_groups_are_those_of_all():
    values = torch.cat([torch.randn(400), 30 + 3 * torch.randn(50), torch.zeros(7)]).double()
    parts = [Moments.of(part) for part in values.split([1, 300, 56, 100])]
    joined = Moments()
    for part in parts:
        joined = joined.joined(part)
    distances = values - values.mean()
    assert joined.count == len(values)
    assert joined.mean == pytest.approx(values.mean().item())
    assert joined.variance == pytest.approx(distances.square().mean().item())
    assert joined.kurtosis == pytest.approx((distances**4).mean().item() / distances.square().mean().item() ** 2)
    assert joined.third == pytest.approx((distances**3).sum().item())


def test_a_linear_map_is_fitted_without_error_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    linear = inputs @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 5
    errors = []
    for added in (linear, noise, linear + noise):
        fit = _LinearFit(6, torch.device("cpu"))
        for part in (slice(0, 1500), slice(1500, 4000)):
            fit.add(inputs[part], added[part])
        errors.append(fit.error())
    assert errors[0] == pytest.approx(0, abs=1e-6)
    assert errors[1] == pytest.approx(1, abs=0.02)
    design = torch.cat([inputs, inputs.new_ones(4000, 1)], dim=1)
    residual = linear + noise - design @ torch.linalg.lstsq(design, linear + noise).solution
    total = linear + noise - (linear + noise).mean(0)
    assert errors[2] == pytest.approx((residual.square().sum() / total.square().sum()).item(), rel=0.01)


def test_few_tokens_fit_anything_so_nothing_is_said():
    fit = _LinearFit(6, torch.device("cpu"))
    fit.add(torch.randn(13, 6).double(), torch.randn(13, 6).double())
    assert fit.error() is None


def test_alignment_is_that_of_kernels_by_hand():
    """HSIC_1 by its sum over quadruples of different tokens, which is what unbiased means."""
    outputs = [torch.randn(7, 3).double(), torch.randn(7, 5).double()]
    alignment = Alignment(2)
    alignment.add(outputs)
    kernels = [output @ output.T for output in outputs]

    def hsic(one, other):
        total = 0.0
        count = 0
        for i, j, q, r in torch.cartesian_prod(*[torch.arange(7)] * 4).tolist():
            if len({i, j, q, r}) == 4:
                total += one[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
                count += 1
        return total / count

    expected = hsic(*kernels) / (hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1])) ** 0.5
    matrix = alignment.matrix()
    assert matrix[0][1] == pytest.approx(expected.item())
    assert matrix[0][0] == pytest.approx(1)
    # Rotations and scales of features change nothing.
    rotation = torch.linalg.qr(torch.randn(5, 5).double())[0]
    alignment = Alignment(2)
    alignment.add([outputs[1], 3 * outputs[1] @ rotation])
    assert alignment.matrix()[0][1] == pytest.approx(1)


def test_similarity_is_the_cosine_of_a_token_before_and_after_its_block():
    model = tiny_dit(num_layers=1)
    block = model.transformer_blocks[0]
    buckets = TimestepBuckets(1)
    buckets._current = [0, 0]
    site = Site(kind="block", index=0, path="transformer_blocks.0", width=16, blocks=1, streams=1)
    recorder = BlockRecorder(site, block, buckets)
    seen = {}
    block.register_forward_hook(lambda m, a, k, out: seen.update(before=a[0], after=out), with_kwargs=True)
    block.register_forward_hook(recorder, with_kwargs=True)
    predict(model)
    cosine = torch.nn.functional.cosine_similarity(seen["before"], seen["after"], dim=-1)
    assert recorder.similarity() == [pytest.approx(cosine.mean().item())]


@pytest.fixture(scope="module")
def analysed():
    model = tiny_dit(num_layers=2)
    return model, dg.analyze(model, batches(3), noise_scheduler=SCHEDULER, band=1, buckets=2, progress=False)


def test_an_analysis_leaves_the_model_alone_and_covers_all_of_it(analysed):
    model, found = analysed
    assert model.graft is None
    assert not any(module._forward_hooks for module in model.modules())
    assert list(found.locality) == ["self_attention[0]", "self_attention[1]"]
    assert [row.site for row in found.activations][:2] == ["self_attention[0]", "feed_forward[0]"]
    assert [row.path for row in found.blocks] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert sum(found.samples) == 24
    assert found.bounds == [0, 0.5, 1]
    assert found.cka[0][0] == pytest.approx(1)


def test_buckets_together_are_all_samples(analysed):
    model, found = analysed
    whole = dg.analyze(model, batches(3), noise_scheduler=SCHEDULER, band=1, buckets=1, progress=False)
    assert found.locality == pytest.approx(whole.locality)


def test_statistics_are_those_of_the_outputs(analysed):
    model, _ = analysed
    outputs = []
    handle = model.transformer_blocks[1].ff.register_forward_hook(lambda m, a, out: outputs.append(out))
    found = dg.analyze(model, batches(2), noise_scheduler=SCHEDULER, buckets=1, progress=False)
    handle.remove()
    values = torch.cat(outputs).double()
    (row,) = next(row for row in found.activations if row.site == "feed_forward[1]").buckets
    assert row["count"] == values.numel()
    assert row["variance"] == pytest.approx(values.var(correction=0).item(), rel=1e-4)
    value, channel = row["largest"][0]
    assert value == pytest.approx(values.abs().amax().item())
    assert values.abs().flatten(0, 1).amax(0).argmax() == channel


def test_an_analysis_is_saved_drawn_and_printed(analysed, tmp_path):
    _, found = analysed
    found.save(tmp_path / "analysis.json")
    loaded = dg.Analysis.load(tmp_path / "analysis.json")
    assert loaded.to_dict() == found.to_dict()
    assert str(loaded) == str(found)
    assert "self_attention[1]" in str(found)
    assert "<table>" in found._repr_html_()
    found.draw(tmp_path / "analysis.png")
    assert (tmp_path / "analysis.png").stat().st_size > 10_000
    (tmp_path / "analysis.json").write_text(json.dumps({"format": 1, "samples": []}))
    with pytest.raises(FileError, match="not an analysis"):
        dg.Analysis.load(tmp_path / "analysis.json")
    (tmp_path / "analysis.json").write_text(json.dumps({**found.to_dict(), "format": 2}))
    with pytest.raises(FileError, match="format 2"):
        dg.Analysis.load(tmp_path / "analysis.json")


def test_an_analysis_chooses_sites(analysed):
    model, found = analysed
    better = max(found.locality, key=found.locality.get)
    plan = dg.plan_graft(model, {dg.top_local(found, 0.5): "hyena_x"})
    assert [edit.site.address for edit in plan.edits] == [better]
    assert dg.low_local(found, 0.5) != dg.top_local(found, 0.5)


def test_the_image_part_of_joint_attention_is_measured():
    """Against the processor's own queries and keys."""
    model = tiny("SD3Transformer2DModel")
    inputs = inputs_of("SD3Transformer2DModel")
    with torch.no_grad():
        before = model(**inputs).sample
    found = dg.analyze(model, [inputs], buckets=1, progress=False)
    kinds = {row.site.partition("[")[0] for row in found.localities}
    assert kinds == {"joint_attention", "self_attention"}
    joint = next(row for row in found.localities if row.site == "joint_attention[0]")
    attention = model.get_submodule(joint.path)
    seen = {}
    attention.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs_of("SD3Transformer2DModel")).sample, before)

    def heads(layer, states, norm):
        split = layer(states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        return split if norm is None else norm(split)

    image, text = seen["hidden_states"], seen["encoder_hidden_states"]
    query = heads(attention.to_q, image, attention.norm_q)
    key = torch.cat(
        [
            heads(attention.to_k, image, attention.norm_k),
            heads(attention.add_k_proj, text, attention.norm_added_k),
        ],
        dim=2,
    )
    mass = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    tokens = image.shape[1]
    inside = mass[..., :tokens]
    assert joint.others[0] == pytest.approx(1 - inside.sum(-1).mean().item(), abs=1e-5)
    rows = inside / inside.sum(-1, keepdim=True)
    index = torch.arange(tokens)
    near = (index[:, None] - index).abs() <= found.protocol["band"]
    assert joint.band[0] == pytest.approx((rows * near).sum(-1).mean((0, 2)).tolist(), abs=1e-5)


def grafted():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    return model


@pytest.mark.parametrize(
    ("model", "settings", "error", "words"),
    [
        (grafted, {}, StateError, "unset_graft"),
        (tiny_dit, {"buckets": 0}, GraftError, "1 bucket or more"),
        (tiny_dit, {"band": -1}, GraftError, "from 0"),
        (tiny_dit, {"kernel": 2}, GraftError, "odd"),
        (tiny_dit, {"batches": []}, TrainingError, "no batches"),
        (tiny_dit, {"batches": [{"sample": torch.zeros(1, 1, 8, 8)}]}, TrainingError, "class_labels"),
        (
            tiny_dit,
            {"batches": [{**batches(1)[0], "sample": torch.full((8, 1, 8, 8), torch.nan)}]},
            TrainingError,
            "finite",
        ),
        (lambda: torch.nn.Linear(1, 1), {}, GraftError, "diffusers model"),
    ],
)
def test_an_analysis_of_nothing_is_refused(model, settings, error, words):
    model = model()
    with pytest.raises(error, match=words):
        dg.analyze(model, **{"batches": batches(1), "noise_scheduler": SCHEDULER, "progress": False, **settings})
    assert not any(module._forward_hooks for module in model.modules())
