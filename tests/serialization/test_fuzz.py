"""Mutated files by the hundred: each is refused in words, or loads and is what was saved."""

import json
import random
import shutil
import struct

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import GraftError

from ..models import predict, tiny_dit
from .forging import CONFIG, PROOF, RULES, WEIGHTS

JUNK = [
    None,
    True,
    -1,
    0,
    1,
    2**70,
    1e308,
    "",
    "x",
    "../x",
    "__class__",
    [],
    [[]],
    {},
    {"operator": "mlp"},
    [1, 2],
    "mlp",
    "\0",
    "💥",
]


def flip_bytes(data, chance):
    data = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def flip_in_header(data, chance):
    length = struct.unpack("<Q", data[:8])[0] if data[:1] not in b"{-" else len(data) - 8
    return flip_bytes(data[: 8 + length], chance) + data[8 + length :]


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def doubled(data, chance):
    place = chance.randrange(len(data))
    return data[:place] + data[place // 2 :]


def digits(data, chance):
    """Another digit for one of the description's."""
    places = [place for place, byte in enumerate(data[:20_000]) if byte in b"0123456789"]
    place = chance.choice(places)
    return data[:place] + bytes([chance.choice(b"0123456789")]) + data[place + 1 :]


def spots(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from spots(child, (*path, key))


def with_junk(value, chance):
    """One entry somewhere replaced, removed, or joined by another."""
    path = chance.choice([spot for spot in spots(value) if spot])
    place = value
    for key in path[:-1]:
        place = place[key]
    action = chance.choice(["replace", "replace", "remove", "add"])
    if action == "remove":
        del place[path[-1]]
    elif action == "add" and isinstance(place, dict):
        place[chance.choice(["__init__", "x", "format", "operator"])] = chance.choice(JUNK)
    else:
        place[path[-1]] = chance.choice(JUNK)
    return value


def json_junk(data, chance):
    return json.dumps(with_junk(json.loads(data), chance)).encode()


def header_junk(data, chance):
    """The header of a safetensors file, as JSON, or the description inside it; the length told truly."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    inside = header.get("__metadata__", {}).get("graft_config")
    if inside and chance.random() < 0.6:
        header["__metadata__"]["graft_config"] = json_junk(inside, chance).decode()
    else:
        header = with_junk(header, chance)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


BYTES = [flip_bytes, flip_in_header, cut, doubled, digits]
GRAFT = {
    WEIGHTS: [*BYTES, header_junk, header_junk, header_junk],
    CONFIG: [*BYTES, json_junk, json_junk],
    PROOF: [*BYTES, header_junk],
}
WHOLE = {
    "SHARD": [*BYTES, header_junk],
    "config.json": [*BYTES, json_junk, json_junk],
    "diffusion_pytorch_model.safetensors.index.json": [*BYTES, json_junk, json_junk],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    model = tiny_dit(num_layers=2)
    model.set_graft({**RULES, "feed_forward[0]": {"operator": "mlp", "expansion": 2}})
    model.save_graft(folder / "graft")
    model.save_pretrained(folder / "whole", max_shard_size="25KB")
    return folder, predict(model)


def mutate(folder, table, chance):
    name = chance.choice(list(table))
    path = folder / name if name != "SHARD" else sorted(folder.glob("*00001-of*"))[0]
    data = path.read_bytes()
    mutated = chance.choice(table[name])(data, chance)
    path.write_bytes(mutated)
    if name == WEIGHTS and chance.random() < 0.7:  # so that the copy in the header stands alone
        (folder / CONFIG).unlink()
    if name != PROOF:
        (folder / PROOF).unlink(missing_ok=True)
    return name


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_mutated_grafts(start, sound, tmp_path):
    """One model for all: what is refused must leave it as it was."""
    source, expected = sound
    model = tiny_dit(num_layers=2)
    tensors, modules = {name: t.clone() for name, t in model.state_dict().items()}, dict(model.named_modules())
    loads = 0
    for seed in range(start, start + 100):
        folder = shutil.copytree(source / "graft", tmp_path / "graft")
        name = mutate(folder, GRAFT, random.Random(seed))
        try:
            model.load_graft(folder)
        except GraftError:
            assert model.graft is None
        else:
            loads += 1
            if name != PROOF:
                assert torch.equal(predict(model), expected), f"seed {seed} loaded as something else"
            model.unset_graft()
        assert dict(model.named_modules()) == modules, seed
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items()), seed
        shutil.rmtree(folder)
    assert loads < 60


def test_mutated_whole_models(sound, tmp_path):
    source, expected = sound
    for seed in range(100):
        folder = shutil.copytree(source / "whole", tmp_path / "whole")
        mutate(folder, WHOLE, random.Random(seed))
        try:
            model = dg.load_pretrained(folder)
        except GraftError:
            pass
        else:
            assert torch.equal(predict(model), expected), f"seed {seed} loaded as something else"
        shutil.rmtree(folder)
