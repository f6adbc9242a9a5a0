"""Saved grafts, and changes to them that keep everything consistent but the one thing that a test is about."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_graft.serialization import tensors as files

from ..models import predict, tiny_dit

RULES = {
    "self_attention[1::2]": {"operator": "hyena_x", "init": "random"},
    "feed_forward[0]": {"operator": "mlp", "expansion": 6},
}
OTHER = {"self_attention[0]": "neighborhood"}
CONFIG, WEIGHTS, PROOF = "graft_config.json", "graft_model.safetensors", "graft_proof.safetensors"


def saved(folder, model=None, rules=RULES, **settings):
    """Outputs of a model whose graft was saved to a folder."""
    model = model or tiny_dit()
    model.set_graft(rules)
    model.save_graft(folder, **settings)
    return predict(model)


def grafted(rules):
    model = tiny_dit()
    model.set_graft(rules)
    return model


def loaded(folder):
    model = tiny_dit()
    model.load_graft(folder)
    return predict(model)


def forge(folder, change, *, honest=True):
    """Write the graft of a folder again after `change(config, tensors)`, its checksum made to fit unless not `honest`."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["graft_config"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    result = change(config, tensors)
    config = result if isinstance(result, dict | str) else config
    if honest and isinstance(config, dict):
        config["checksum"] = files.checksum(tensors)
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(tensors, path, metadata={"graft_config": text})
    (folder / CONFIG).write_text(text)


def read_mark(folder):
    """What `config.json` says of the graft of a whole model."""
    return json.loads((folder / "config.json").read_text())["_graft"][""]


def write_mark(folder, description, **settings):
    """Have `config.json` say this of the graft, and that of the model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_graft": {"": description}, **settings}))


def untouched(model, refused):
    """That a refusal leaves every tensor, every module and the outputs of a model as they were."""
    before = predict(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, trained = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    refused()
    assert model.graft is None
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(tensors)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not model._forward_pre_hooks
    assert torch.equal(predict(model), before)
