"""The data, the judge and the pretrained model."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import diffusers_graft as dg
from benchmarks.testbed import pretrain
from diffusers_graft import metrics, testbed
from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.metrics.frechet_distance import FeatureStatistics, frechet_distance
from diffusers_graft.evaluation.sampling import SampleFolder
from diffusers_graft.testbed import classifier, sampling


def test_letters_are_reproducible_and_in_range():
    labels = testbed.balanced_labels(40)
    one, same = (testbed.draw_letters(labels, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, same)
    assert one.shape == (40, 1, 16, 16)
    assert one.min() >= -1
    assert one.max() <= 1
    assert (one > 0).flatten(1).sum(1).min() > 5  # ink on every image


def test_whole_fonts_are_held_out():
    assert not set(testbed.HELD_OUT_FONTS) & set(testbed.TRAIN_FONTS)
    assert len(testbed.HELD_OUT_FONTS) == 4


def test_labels_are_balanced():
    assert torch.bincount(testbed.balanced_labels(1000)).tolist() == [100] * 10


def test_batches_follow_their_seed():
    first, again, other = (next(testbed.letter_batches(8, seed)) for seed in (1, 1, 2))
    assert torch.equal(first["sample"], again["sample"])
    assert not torch.equal(first["sample"], other["sample"])
    assert len(list(testbed.letter_batches(2, 0, steps=3))) == 3


def test_the_judge_reads_fonts_it_never_saw():
    logged = json.loads((testbed.WEIGHTS / "classifier.jsonl").read_text())
    measured = classifier.accuracy(classifier.load_classifier(), testbed.HELD_OUT_FONTS, 1000)
    assert measured > 0.97
    assert measured == pytest.approx(logged["accuracy_held_out_fonts"], abs=0.02)


def test_sampling_equals_diffusers_loop_and_is_independent_of_the_batch():
    model, labels = testbed.load(), testbed.balanced_labels(6)
    images = sampling.sample(model, labels, seed=3, steps=4)
    torch.testing.assert_close(
        sampling.sample(model, labels, seed=3, steps=4, batch_size=4), images, rtol=1e-4, atol=1e-4
    )
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(4)
    x = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for t in euler.timesteps:
            x = euler.step(model(x, timestep=t.expand(6), class_labels=labels).sample, t, x).prev_sample
    torch.testing.assert_close(images, x.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_guidance_of_one_is_none():
    model, labels = testbed.load(), testbed.balanced_labels(4)
    plain = sampling.sample(model, labels, seed=3, steps=2)
    torch.testing.assert_close(
        sampling.sample(model, labels, seed=3, steps=2, guidance=1.0000001), plain, rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(sampling.sample(model, labels, seed=3, steps=2, guidance=3.0), plain, atol=1e-2)


def test_a_grid_of_samples_is_a_picture(tmp_path):
    images = testbed.draw_letters(testbed.balanced_labels(13), torch.Generator().manual_seed(0))
    sampling.save_sample_grid(tmp_path / "grid.png", {"one": images, "other": images}, columns=5)
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_the_shipped_files_are_small():
    assert sum(path.stat().st_size for path in testbed.WEIGHTS.iterdir()) < 8 * 2**20


def test_the_shipped_models_held_out_loss_is_the_logged_one():
    rows = [json.loads(line) for line in (testbed.WEIGHTS / "training.jsonl").read_text().splitlines()]
    generator, labels = torch.Generator().manual_seed(1), testbed.balanced_labels(1000)
    images = testbed.draw_letters(labels, generator, testbed.HELD_OUT_FONTS)
    with torch.no_grad():
        loss = pretrain.flow_matching_loss(testbed.load(), images, labels, generator).item()
    assert loss == pytest.approx(rows[-1]["held_out_loss"], rel=1e-3)


def test_pretraining_resumes_exactly(tmp_path):
    recipe = pretrain.Recipe(steps=4, decay=2, warmup=1, batch_size=2)
    whole = pretrain.pretrain(recipe, tmp_path / "whole", save_every=2)
    run = pretrain.Pretraining(recipe, tmp_path / "parts")
    run.output.mkdir()
    for _ in range(2):
        run.train_step()
    run.save()
    parts = pretrain.pretrain(recipe, tmp_path / "parts", save_every=2)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True)
    )


@pytest.mark.long
def test_the_quality_bar_of_the_shipped_model():
    """At 1,000 class-balanced samples: Frechet distance at most 8 x that of real images, accuracy at least 0.93."""
    floor, _ = sampling.real_baseline(1000)
    scores = sampling.SampleQuality(count=1000, steps=20)(testbed.load())
    assert scores["frechet_distance"] <= 8 * floor
    assert scores["accuracy"] >= 0.93


def test_panels_of_samples_have_a_gap_between_them(tmp_path):
    from matplotlib.image import imread

    black = torch.ones(10, 1, 16, 16)
    sampling.save_sample_grid(tmp_path / "samples.png", {"one": black, "other": black})
    line = imread(tmp_path / "samples.png")[-40, :, 0]
    gap = (line[len(line) // 4 : -len(line) // 4] > 0.9).sum()
    assert gap > 20


@pytest.mark.parametrize("settings", [{"count": 1}, {"count": -2}, {"steps": 0}])
def test_samples_that_cannot_be_judged_are_refused(settings):
    with pytest.raises(GraftError, match="2 images"):
        sampling.SampleQuality(**settings)


def test_letters_are_drawn_and_judged_without_downloads(tmp_path):
    """All metrics of distributions run on the testbed, and agree with its own judge on the same pictures."""
    judge = classifier.LetterJudge()
    labels = testbed.balanced_labels(300)
    images = testbed.draw_letters(labels, torch.Generator().manual_seed(3))
    reference = metrics.save_reference(tmp_path / "letters.npz", ((images + 1) / 2).split(100), judge)
    scores = dg.evaluate(
        testbed.load(),
        testbed.balanced_labels(80).tolist(),
        sampling=dg.Sampling(draw=sampling.draw, steps=2, batch_size=40),
        metrics=[
            metrics.FID(reference=reference, extractor=judge),
            metrics.KID(reference=reference, extractor=judge, subset_size=80, subsets=2),
            metrics.PrecisionRecall(reference=reference, extractor=judge),
            metrics.InceptionScore(extractor=judge),
        ],
        output=tmp_path / "samples",
    )
    drawn = SampleFolder(tmp_path / "samples", range(80)).read(range(80)) * 2 - 1
    features = classifier.load_classifier().features(drawn)
    of_reference = FeatureStatistics.of(classifier.load_classifier().features(images))
    assert scores["fid"] == pytest.approx(frechet_distance(FeatureStatistics.of(features), of_reference), rel=1e-4)
    assert 1 < scores["inception_score"] < 10
    assert scores.protocol["draw"] == "draw"
    assert scores.protocol["FID.extractor"].startswith("LetterJudge ")
