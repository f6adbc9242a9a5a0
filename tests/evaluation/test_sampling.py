"""Samples of tiny pipelines: reproducible one by one, resumable, shared out, and refused early where they cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image

import diffusers_graft as dg
from diffusers_graft.errors import FileError, GraftError, MismatchError, MissingDependencyError, ModelError, StateError
from diffusers_graft.evaluation import metrics
from diffusers_graft.evaluation.sampling import SampleFolder, Sampling, draw_with_pipeline, make_generator

from ..models import SCHEDULER, batches, tiny_dit
from ..training.test_distributed import free_port
from .pipelines import LABELS, SAMPLING, Judge, judged_by, tiny_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return metrics.save_reference(tmp_path_factory.mktemp("reference") / "real.npz", [images], Judge())


@pytest.fixture(scope="module")
def drawn(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "samples"
    dg.evaluate(pipe, LABELS, sampling=SAMPLING, output=folder)
    return contents(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_a_sample_depends_on_the_seed_and_its_place_alone(pipe):
    """Also the noise of DDPM's steps, which `DiTPipeline` leaves to torch's global state."""

    def draw(indices, seed=0):
        generators = [make_generator(seed, index) for index in indices]
        return draw_with_pipeline(pipe, [LABELS[index] for index in indices], generators, SAMPLING)

    together = draw(range(5))
    torch.rand(7)
    assert torch.allclose(draw([3]), together[3:4], atol=1e-5)
    assert torch.allclose(draw([4, 1]), together[[4, 1]], atol=1e-5)
    assert not torch.allclose(draw([3], seed=1), together[3:4], atol=1e-2)


def test_guidance_of_some_channels_leaves_the_others_as_predicted(pipe):
    def draw(channels, guidance):
        sampling = Sampling(steps=1, guidance=guidance, guided_channels=channels, arguments={})
        return draw_with_pipeline(pipe, [1], [make_generator(0, 0)], sampling)

    assert torch.equal(draw(4, 3.0), draw(None, 3.0))
    assert not torch.allclose(draw(3, 3.0), draw(None, 3.0))
    assert torch.equal(draw(3, 1.0), draw(None, 1.0))


def run(folder, *arguments, **variables):
    """Start a process of `sampling_runs`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.evaluation.sampling_runs", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def test_a_killed_run_ends_in_the_same_bytes(pipe, drawn, tmp_path):
    folder = tmp_path / "samples"
    # Within the second batch, some of whose samples are there then.
    assert run(folder, "6").wait(timeout=300) != 0
    assert len(contents(folder)) == 6
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    dg.evaluate(pipe, LABELS, sampling=SAMPLING, output=folder)
    assert contents(folder) == drawn
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_two_processes_draw_and_measure_what_one_does(pipe, drawn, reference, tmp_path):
    variables = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    folder = tmp_path / "samples"
    started = []
    for rank in range(2):
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(run(folder, "-", str(reference.path), **own))
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert contents(folder) == drawn
    alone = dg.evaluate(pipe, LABELS, sampling=SAMPLING, metrics=judged_by(reference), output=folder)
    for rank in range(2):
        shared = dg.Scores.load(tmp_path / f"{rank}.json")
        assert shared.values == pytest.approx(alone.values, rel=1e-9)
        assert shared.protocol == alone.to_dict()["protocol"]


def test_adms_evaluator_reads_the_samples(pipe, reference, tmp_path, monkeypatch):
    """All that reads samples reads a batch of them at a time."""
    path = tmp_path / "samples.npz"
    sizes = []
    read = SampleFolder.read
    monkeypatch.setattr(SampleFolder, "read", lambda self, indices: sizes.append(len(indices)) or read(self, indices))
    settings = {"sampling": SAMPLING, "metrics": judged_by(reference)}
    dg.evaluate(pipe, torch.tensor(LABELS), output=tmp_path / "samples", save_npz=path, **settings)
    assert sizes == [4, 4, 2] * 2
    monkeypatch.undo()
    images = np.load(path)["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (10, 8, 8, 3)
    for index in range(10):
        assert np.array_equal(images[index], np.array(Image.open(tmp_path / "samples" / f"{index:06d}.png")))
    assert torch.equal(
        torch.cat(list(metrics.read_images(path, 4))), SampleFolder(tmp_path / "samples", LABELS).read(range(10))
    )


def test_the_protocol_names_what_decides_the_samples(pipe, reference):
    scores = dg.evaluate(pipe, LABELS, sampling=Sampling(steps=2), seed=3, metrics=judged_by(reference))
    expected = {
        "samples": 10,
        "steps": 2,
        "guidance": 4.0,
        "guided_channels": "all",
        "seed": 3,
        "pipeline": "DiTPipeline",
    }
    assert expected.items() <= scores.protocol.items()
    assert scores.protocol["FID.reference"] == reference.sha256
    assert scores.protocol["autoencoder"].startswith("AutoencoderKL ")
    assert {"dtype", "tf32", "torch", "diffusers", "scheduler"} <= scores.protocol.keys()
    json.dumps(scores.to_dict(), allow_nan=False)


def test_pictures_and_predictions_are_compared_with_the_teachers(pipe):
    chosen = [
        metrics.PictureDistance(extractor=Judge(), lpips=lambda a, b: (a - b).abs().mean((1, 2, 3))),
        metrics.PredictionError(),
    ]
    pipe.transformer.set_graft({"self_attention[0]": "self_attention"})
    try:
        same = dg.evaluate(pipe, LABELS[:4], sampling=SAMPLING, metrics=chosen)
    finally:
        pipe.transformer.unset_graft()
    assert same["prediction_error"] < 1e-9
    assert same["psnr"] == float("inf")
    assert same["ssim"] == pytest.approx(1)
    assert same["lpips"] == 0
    pipe.transformer.set_graft({"self_attention[0]": "identity"})
    try:
        other = dg.evaluate(pipe, LABELS[:4], sampling=SAMPLING, metrics=chosen)
        assert pipe.transformer.graft is not None
    finally:
        pipe.transformer.unset_graft()
    assert other["prediction_error"] > 1e-6
    assert other["psnr"] < 60
    assert other["lpips"] > 0


class NeverDraws(DiTPipeline):
    """A pipeline for what must be refused before the first sample."""

    def __call__(self, class_labels, guidance_scale=4.0, generator=None, num_inference_steps=50, output_type="pil"):
        raise AssertionError("it drew")


@pytest.fixture(scope="module")
def never(pipe):
    return NeverDraws(**pipe.components)


def statistics_alone(folder, width):
    np.savez(folder / "other.npz", mu=np.zeros(width), sigma=np.eye(width))
    return folder / "other.npz"


REFUSED = {
    "no conditions": (lambda folder, ref: {"batches": []}, GraftError, "nothing to draw"),
    "prompts for classes": (lambda folder, ref: {"batches": ["a cat"]}, GraftError, "draws for class labels"),
    "no such class": (lambda folder, ref: {"batches": [1000]}, GraftError, "1000 classes, from 0"),
    "too few samples": (
        lambda folder, ref: {"batches": [1], "metrics": judged_by(ref)},
        GraftError,
        "covariance of 6",
    ),
    "no reference": (
        lambda folder, ref: {"metrics": [metrics.FID(reference=folder / "none.npz", extractor=Judge())]},
        FileError,
        "save_reference",
    ),
    "a reference of another network": (
        lambda folder, ref: {"metrics": [metrics.FID(reference=ref, extractor=Judge(2.0))]},
        MismatchError,
        "holds features of Judge",
    ),
    "statistics without images": (
        lambda folder, ref: {"metrics": [metrics.KID(reference=statistics_alone(folder, 6), extractor=Judge())]},
        FileError,
        "holds statistics",
    ),
    "too few neighbours": (
        lambda folder, ref: {
            "batches": [1, 2],
            "metrics": [metrics.PrecisionRecall(reference=ref, extractor=Judge())],
        },
        GraftError,
        "neighbours=3",
    ),
    "subsets larger than the samples": (
        lambda folder, ref: {"metrics": [metrics.KID(reference=ref, extractor=Judge())]},
        GraftError,
        "subset_size=1000",
    ),
    "no teacher": (lambda folder, ref: {"metrics": [metrics.PictureDistance()]}, StateError, "graft disabled"),
    "no teacher to predict": (
        lambda folder, ref: {"metrics": [metrics.PredictionError()]},
        StateError,
        "graft disabled",
    ),
    "no prompts to compare with": (lambda folder, ref: {"metrics": [metrics.CLIPScore()]}, GraftError, "with prompts"),
    "one value twice": (
        lambda folder, ref: {"metrics": [judged_by(ref)[0], judged_by(ref)[0]]},
        GraftError,
        "FID is given twice",
    ),
    "a file that is there": (
        lambda folder, ref: {"save_npz": statistics_alone(folder, 2)},
        FileError,
        "there already",
    ),
    "a folder of something else": (
        lambda folder, ref: {"output": statistics_alone(folder, 2).parent},
        FileError,
        "no samples.json",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_before_the_first_sample(case, never, reference, tmp_path):
    make, error, words = REFUSED[case]
    settings = {"batches": LABELS, "sampling": SAMPLING, **make(tmp_path, reference)}
    with pytest.raises(error, match=words):
        dg.evaluate(never, settings.pop("batches"), **settings)


def test_samples_of_another_protocol_are_not_mixed(pipe, drawn, tmp_path):
    folder = tmp_path / "samples"
    dg.evaluate(pipe, LABELS[:2], sampling=SAMPLING, output=folder)
    with pytest.raises(FileError, match="steps was 2 and is 3"):
        dg.evaluate(pipe, LABELS[:2], sampling=Sampling(steps=3, guidance=2.0), output=folder)
    with pytest.raises(FileError, match="conditions"):
        dg.evaluate(pipe, [5, 6], sampling=SAMPLING, output=folder)


BAD_IMAGES = {
    "not finite": torch.full((1, 3, 8, 8), torch.nan),
    r"go from -1 to 1": torch.tensor([-1.0, 1.0]).repeat(96).view(1, 3, 8, 8),
    "1 channel or 3": torch.zeros(1, 4, 8, 8),
    r"are images \[B, C, H, W\]": torch.zeros(3, 8, 8),
}


@pytest.mark.parametrize("words", BAD_IMAGES)
def test_images_that_are_none_stop_at_the_first_batch(words, pipe):
    sampling = Sampling(draw=lambda *arguments: BAD_IMAGES[words], batch_size=1)
    with pytest.raises(GraftError, match=words):
        dg.evaluate(pipe, LABELS, sampling=sampling)


def test_samples_of_several_sizes_stop_where_the_size_changes(pipe, tmp_path):
    def draw(pipeline, conditions, generators, sampling):
        return torch.zeros(1, 3, 8, 8 + conditions[0])

    with pytest.raises(GraftError, match=r"one size, \[C, H, W\]; got \(3, 8, 9\) after \(3, 8, 8\)"):
        dg.evaluate(pipe, LABELS, sampling=Sampling(draw=draw, batch_size=1), output=tmp_path)
    # What an interrupted run has drawn counts, too.
    with pytest.raises(GraftError, match=r"after \(3, 8, 8\)"):
        dg.evaluate(pipe, LABELS, sampling=Sampling(draw=draw, batch_size=1), output=tmp_path)


def test_features_that_fit_no_reference_stop_after_the_first_batch(pipe, tmp_path):
    drawn = []

    def draw(pipeline, conditions, generators, sampling):
        drawn.extend(conditions)
        return torch.zeros(len(conditions), 3, 8, 8)

    metric = metrics.FID(reference=statistics_alone(tmp_path, 5), extractor=Judge())
    with pytest.raises(MismatchError, match="6 features with a reference of 5"):
        dg.evaluate(pipe, LABELS, sampling=Sampling(draw=draw, batch_size=4), metrics=[metric])
    assert len(drawn) == 4


def test_adms_reference_files_are_read_as_they_are(reference, tmp_path):
    """Statistics for the network they are of, images for others."""
    judge = Judge()
    judge.is_inception = True
    images = (255 * torch.rand(30, 8, 8, 3)).byte().numpy()
    arrays = {"mu": np.ones(6), "sigma": 2 * np.eye(6), "mu_s": np.zeros(4), "sigma_s": np.eye(4), "arr_0": images}
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", **arrays)
    adm = metrics.Reference(tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    assert adm.statistics(judge, "features").covariance.trace() == 12
    assert adm.statistics(judge, "spatial").mean.shape == (4,)
    expected = Judge()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    assert torch.allclose(adm.features(Judge(), "features"), expected)
    assert torch.allclose(adm.statistics(Judge(), "features").mean, expected.double().mean(0))


@pytest.mark.parametrize("content", [b"no zip", None], ids=["damaged", "other arrays"])
def test_files_that_are_no_reference(content, tmp_path):
    path = tmp_path / "reference.npz"
    if content is None:
        np.savez(path, weights=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(FileError, match=str(path)):
        metrics.Reference(path)


def test_a_reference_is_not_written_over(reference):
    with pytest.raises(FileError, match="there already"):
        metrics.save_reference(reference.path, [torch.rand(4, 3, 8, 8)], Judge())


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (metrics.InceptionScore(), r"diffusers-graft\[fid\]"),
        (metrics.ImageReward(), r"diffusers-graft\[image-reward\]"),
        (metrics.HPSv2(), r"diffusers-graft\[hps\]"),
        (metrics.PictureDistance(lpips="alex"), r"diffusers-graft\[lpips\]"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(metric, words, monkeypatch):
    for library in ("torch_fidelity", "ImageReward", "hpsv2", "lpips"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=words):
        metric.check(["a cat"])


def test_a_model_alone_draws_nothing(reference, tmp_path):
    with pytest.raises(GraftError, match="a model alone draws none"):
        dg.evaluate(tiny_dit(), batches(1), noise_scheduler=SCHEDULER, metrics=judged_by(reference))
    with pytest.raises(GraftError, match="Give a pipeline"):
        dg.evaluate(tiny_dit(), batches(1), noise_scheduler=SCHEDULER, output=tmp_path)
    with pytest.raises(ModelError, match="takes neither prompts"):
        dg.evaluate(tiny_dit(), LABELS, sampling=Sampling(steps=2))


def test_predictions_are_compared_on_held_out_batches_too():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "identity"})
    scores = dg.evaluate(model, batches(2), noise_scheduler=SCHEDULER, metrics=[metrics.PredictionError(buckets=2)])
    assert scores["prediction_error"] > 0
    assert min(scores["prediction_error_0_500"], scores["prediction_error_500_1000"]) > 0
    assert scores.protocol["PredictionError.buckets"] == 2
    assert "denoising_loss" in scores.values


@pytest.mark.parametrize("settings", [{"steps": 0}, {"batch_size": 0}, {"guided_channels": 1.5}])
def test_counts_of_sampling(settings):
    with pytest.raises(GraftError, match=next(iter(settings))):
        Sampling(**settings)
