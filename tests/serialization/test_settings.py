"""Settings that a file may change: numbers of known places alone."""

import pytest

from diffusers_graft.errors import FileError
from diffusers_graft.serialization.settings import apply_settings, frequency_settings

from ..models import tiny_dit


def shifts(model):
    return [model.get_submodule(row["path"]).downscale_freq_shift for row in frequency_settings(model, 0)]


@pytest.mark.parametrize("value", [1e308, -1, 2, float("nan"), True, "0", None])
def test_a_value_that_no_save_writes_changes_nothing(value):
    model = tiny_dit()
    before = shifts(model)
    rows = frequency_settings(model, 0)
    rows[-1]["value"] = value
    with pytest.raises(FileError, match="none that a file may change"):
        apply_settings(model, rows)
    assert shifts(model) == before


def test_more_settings_than_the_model_has_modules_are_refused():
    model = tiny_dit()
    with pytest.raises(FileError, match="more than the model has modules"):
        apply_settings(model, frequency_settings(model, 0) * 1000)


def test_settings_are_applied():
    model = tiny_dit()
    apply_settings(model, frequency_settings(model, 0))
    assert set(shifts(model)) == {0}
