"""Inception as FID has it: one file of weights, and features laid out as ADM's evaluator has them."""

import hashlib

import pytest
import torch

from diffusers_graft.errors import FileError, ModelError
from diffusers_graft.evaluation.metrics import inception


def test_weights_that_are_missing_are_named_with_their_address(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileError, match="weights-inception-2015-12-05-6726825d.pth. Download https://github.com"):
        inception.find_weights()


def test_other_weights_are_refused_before_they_are_opened(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"another network")
    with pytest.raises(FileError, match="6726825d"):
        inception.find_weights(path)


def test_the_spatial_features_are_seven_channels_of_a_middle_layer(tmp_path, monkeypatch):
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    # Its own constructor would download the weights; these are random.
    monkeypatch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    theirs = library.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    monkeypatch.undo()
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    monkeypatch.setattr(inception, "_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    ours = inception.Inception(path)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: seen.update(spatial=output))
    with torch.no_grad():
        features, logits = theirs((images * 255).round().byte())
        outputs = ours(images)
    assert torch.equal(outputs["features"], features)
    assert torch.equal(outputs["logits"], logits)
    assert outputs["spatial"].shape == (2, 2023)
    # Channels last: the first seven numbers are those of the first place.
    assert torch.equal(outputs["spatial"][:, :7], seen["spatial"][:, :7, 0, 0])
    assert torch.equal(outputs["spatial"][:, 7:14], seen["spatial"][:, :7, 0, 1])
    with pytest.raises(ModelError, match="3 channels"):
        ours(images[:, :1])
