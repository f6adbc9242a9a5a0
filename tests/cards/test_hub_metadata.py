"""Entries of a card that the Hub accepts."""

import pytest

from diffusers_graft.cards.hub_metadata import TASKS, check_license, check_task, is_dataset_id, task_of
from diffusers_graft.errors import GraftError, UnknownNameError

from ..tiny_models import exported


def test_every_family_has_a_task_of_the_hub():
    tasks = {name: task_of(name) for name in exported()}
    # proteins are the one thing that the Hub has no task for
    assert [name for name, task in tasks.items() if task is None] == ["RFD4ProteinaTransformer"]
    assert set(tasks.values()) - {None} <= set(TASKS)
    assert tasks["DiTTransformer2DModel"] == "unconditional-image-generation"
    assert tasks["LTXVideoTransformer3DModel"] == "text-to-video"
    assert tasks["StableAudioDiTModel"] == "text-to-audio"
    assert task_of("SomebodysModel") is None


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("imagenet-1k", True),
        ("ILSVRC/imagenet-1k", True),
        ("laion/laion2B-en-aesthetic", True),
        ("ImageNet, 8 % held out", False),
        ("our photos", False),
        ("a/b/c", False),
        ("", False),
        ("-x", False),
        ("gemälde", False),
    ],
)
def test_ids_of_data_sets(name, is_id):
    assert is_dataset_id(name) is is_id


@pytest.mark.parametrize("license", ["Apache 2.0", "MIT License", "apache2", "", 3])
def test_licenses_without_an_id_are_refused(license):
    with pytest.raises(UnknownNameError, match="license='other'"):
        check_license(license)


def test_a_license_without_an_id_has_a_name():
    check_license("other", "stability-community", "LICENSE.md")
    check_license("openrail++")
    check_license(None)
    with pytest.raises(GraftError, match="give license_name"):
        check_license("other")
    with pytest.raises(GraftError, match="license='other'"):
        check_license("mit", "mine")


def test_a_license_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'cc-by-nc-4\.0'"):
        check_license("cc-by-nc4.0")


def test_tasks_that_the_hub_does_not_know_are_refused():
    check_task("text-to-video")
    with pytest.raises(UnknownNameError, match="Did you mean 'text-to-image'"):
        check_task("text2image")
