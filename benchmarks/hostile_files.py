"""Saved grafts and models changed as a stranger might: each kind of change draws its details from a generator.

A change keeps checksums and hashes honest where it says so, so that what is refused is refused for what it asks for.
"""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_graft.serialization.load_model import config_digest
from diffusers_graft.serialization.tensors import checksum

CONFIG = "graft_config.json"
WEIGHTS = "graft_model.safetensors"
PROOF = "graft_proof.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"

HUGE = [10**4, 10**6, 10**9, 2**31, 2**40, 2**63, 10**30]
ODD = [None, True, -1, 0, 1, 0.5, -1e-9, 1e308, "", "x", "../x", "__class__", "\0", "\ud800", "💥"]
NESTED = [
    [],
    [[]],
    {},
    [1, 2],
    [10**9] * 3,
    list(range(5000)),
    {"operator": "mlp"},
    {"operator": "hybrid", "first": "hybrid"},
]
JUNK = [*ODD, *HUGE, *NESTED]

Change = Callable[[Path, random.Random], None]


def forge(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Write the graft of a folder again after a change of its description and tensors, with an honest checksum."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["graft_config"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(config, tensors)
    config["checksum"] = checksum(tensors)
    text = json.dumps(config).replace('"INFINITE"', "1e999")
    save_file(tensors, path, metadata={"graft_config": text})
    (folder / CONFIG).write_text(text)


def forge_model(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Write the `config.json` of a full model again after a change of it and of its description, honestly."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    description = config["_graft"][""]
    change(config, description)
    if isinstance(description.get("model"), str):
        description["model"] = config_digest(config)
    path.write_text(json.dumps(config))


# Changes of a graft's description


def change_setting(folder: Path, chance: random.Random) -> None:
    """Give an operator's setting a value that may cost time or memory."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        edit = chance.choice(config["plan"]["edits"])
        names = [name for name in edit if name not in ("site", "operator")]
        for name in chance.sample(names, min(len(names), chance.randint(1, 2))):
            edit[name] = chance.choice([*HUGE, *JUNK, [chance.choice(HUGE)] * chance.randint(1, 3)])

    forge(folder, change)


def change_site(folder: Path, chance: random.Random) -> None:
    """Give a site another size, kind or path."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        site = chance.choice(config["plan"]["edits"])["site"]
        site[chance.choice(list(site))] = chance.choice(JUNK)

    forge(folder, change)


def lengthen_plan(folder: Path, chance: random.Random) -> None:
    """List thousands of edits."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        edits = config["plan"]["edits"]
        count = chance.choice([2, 100, 3000, 40_000])
        config["plan"]["edits"] = [copy.deepcopy(chance.choice(edits)) for _ in range(count)]
        for number, edit in enumerate(config["plan"]["edits"]):
            if chance.random() < 0.9:
                edit["site"] = {**edit["site"], "path": f"blocks.{number}", "index": number}

    forge(folder, change)


def nest_operators(folder: Path, chance: random.Random) -> None:
    """Put operators within operators, deep or wide."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        spec: Any = "sliding_window"
        for _ in range(chance.choice([1, 5, 20, 60])):
            second = copy.deepcopy(spec) if chance.random() < 0.1 else "self_attention"
            spec = {"operator": "hybrid", "first": spec, "second": second, "split": chance.choice([0.5, 1, HUGE[0]])}
        edit = chance.choice(config["plan"]["edits"])
        config["plan"]["edits"] = [{"site": edit["site"], **spec}]

    forge(folder, change)


def change_entry(folder: Path, chance: random.Random) -> None:
    """Replace, remove or add an entry anywhere in the description."""
    forge(folder, lambda config, tensors: put_junk(config, chance))


def change_lora(folder: Path, chance: random.Random) -> None:
    """Claim LoRA of other ranks, numbers or layers than the tensors have."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        lora = config.get("lora")
        if not isinstance(lora, dict):
            lora = {"lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "layers": {}}
            config["lora"] = lora
        paths = list(lora["layers"]) or ["transformer_blocks.0.attn1.to_q", "proj_out_2"]
        path = chance.choice([*paths, "(a+)+$", "transformer_blocks.99.ff", ""])
        row = {"r": 2, "alpha": 2, **lora["layers"].get(path, {})}
        row[chance.choice(["r", "alpha", "scaling"])] = chance.choice([*HUGE, 65_535, "INFINITE", -1e300, *JUNK])
        lora["layers"][path] = row
        if chance.random() < 0.3:
            lora[chance.choice(list(lora))] = chance.choice(JUNK)

    forge(folder, change)


def change_values(folder: Path, chance: random.Random) -> None:
    """Store values that are not finite, or are not once they are unpacked or cast."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = chance.choice(sorted(tensors))
        tensor = tensors[name]
        if tensor.is_floating_point():
            value = chance.choice([float("nan"), float("inf"), 3e38, 1e30, -3e38])
            tensor.view(-1)[chance.randrange(tensor.numel()) :].fill_(value)
        else:
            tensors[name] = torch.full_like(tensor, 127)

    forge(folder, change)


def change_tensors(folder: Path, chance: random.Random) -> None:
    """Rename, drop, add, retype or reshape tensors."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = chance.choice(sorted(tensors))
        action = chance.randrange(6)
        if action == 0:
            del tensors[name]
        elif action == 1:
            tensors[f"{name}.{chance.choice(['x', 'lora_A.weight', 'graft', 'left'])}"] = torch.zeros(2, 2)
        elif action == 2:
            tensors[name] = tensors[name].reshape(-1)[:1].clone()
        elif action == 3:
            tensors[name] = tensors[name].to(chance.choice([torch.float64, torch.int8, torch.bfloat16, torch.bool]))
        elif action == 4:
            tensors.update({f"{name}.{number}": torch.zeros(1) for number in range(chance.choice([10, 20_000]))})
        else:
            tensors[name] = torch.zeros(0, *tensors[name].shape[1:])

    forge(folder, change)


def change_code(folder: Path, chance: random.Random) -> None:
    """Claim operators that come as code, with other files, hashes or text."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = chance.choice(["pass_on", "hyena_x", "os", "../x", "x.y", ""])
        file = chance.choice([f"graft_operator_{name}.py", CONFIG, "../x.py", "/etc/passwd", ".hidden", "\ud800"])
        row: Any = {"file": file, "sha256": chance.choice(["0" * 64, "", "x"])}
        config["code"] = chance.choice([{name: row}, {name: 5}, [row], {name: {"file": 5, "sha256": 5}}])
        edit = chance.choice(config["plan"]["edits"])
        if chance.random() < 0.7:
            edit["operator"] = name

    forge(folder, change)


# Changes of a proof


def change_proof(folder: Path, chance: random.Random) -> None:
    """Prove by inputs of other shapes, types or values, or by another recipe."""
    path = folder / PROOF
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    action = chance.randrange(6)
    if action == 0:
        shape = [chance.choice([size, size, 0, 3, 512, 1500]) for size in tensor.shape]
        size = torch.Size(shape).numel()
        tensors[name] = torch.zeros(shape if size < 2**22 else [2**11, 2**10], dtype=tensor.dtype)
    elif action == 1 and tensor.is_floating_point():
        tensor.view(-1)[:1].fill_(chance.choice([float("nan"), float("inf"), 3e38]))
    elif action == 2:
        tensors[name] = tensor.to(chance.choice([torch.int64, torch.float64, torch.bool, torch.float16]))
    elif action == 3:
        del tensors[name]
    elif action == 4 and "recipe" in tensors:
        recipe = json.loads(bytes(tensors["recipe"].tolist()))
        text = json.dumps(put_junk(recipe, chance)).encode()
        tensors["recipe"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    else:
        tensors[chance.choice(["inputs.x", "recipe", "inputs.class_labels"])] = torch.full((1,), 10**6)
    save_file(tensors, path)


# Changes of a full model


def change_model_config(folder: Path, chance: random.Random) -> None:
    """Ask for a model of other sizes, of another class, or of settings that no model has."""

    def change(config: dict[str, Any], description: dict[str, Any]) -> None:
        names = [name for name in config if name != "_graft"]
        for name in chance.sample(names, chance.randint(1, 3)):
            config[name] = chance.choice([*HUGE, *HUGE, *JUNK])
        if chance.random() < 0.2:
            classes = ["FluxTransformer2DModel", "AutoencoderKL", "UNet2DModel", "PixArtTransformer2DModel", "os"]
            config["_class_name"] = chance.choice(classes)

    forge_model(folder, change)


def change_model_entry(folder: Path, chance: random.Random) -> None:
    """Replace, remove or add an entry anywhere in the description of a full model."""
    forge_model(folder, lambda config, description: put_junk(description, chance))


def change_model_setting(folder: Path, chance: random.Random) -> None:
    """Change settings of operators, of the model, or of its LoRA."""

    def change(config: dict[str, Any], description: dict[str, Any]) -> None:
        edit = chance.choice(description["plan"]["edits"])
        edit[chance.choice(list(edit))] = chance.choice([*HUGE, *JUNK])
        row = {"path": "transformer_blocks.0.norm1.emb.time_proj", "attribute": "downscale_freq_shift"}
        description["settings"] = [{**row, "value": chance.choice(JUNK)}] * chance.choice([0, 1, 30_000])

    forge_model(folder, change)


def change_index(folder: Path, chance: random.Random) -> None:
    """List other shards, or so many tensors that reading the list takes long."""
    path = folder / INDEX
    index = json.loads(path.read_text())
    mapped = index["weight_map"]
    name = chance.choice(["../x", "\ud800", "\0", "x" * 5000, "/dev/zero", 5, None, INDEX, ".saved", *mapped.values()])
    if chance.random() < 0.5:
        mapped[chance.choice(list(mapped))] = name
    else:
        mapped.update({f"t{number}": name for number in range(chance.choice([1, 1000, 100_000]))})
    path.write_text(json.dumps(index))


# Changes of any file


def grow_json(folder: Path, chance: random.Random) -> None:
    """Write JSON that takes much memory, or much depth, for its length."""
    count = chance.choice([10**3, 10**5, 10**6, 3 * 10**6])
    piece, end = chance.choice(
        [("[],", "[]"), ("{},", "1"), ("1,", "1"), ('"",', "1"), ("[", ""), ('"💥",', "1"), ("9", "9")]
    )
    text = '{"format": 2, "x": [' + piece * count + end + "]}"
    if chance.random() < 0.2:
        text = '{"format": 2, ' + ",".join(f'"{number}": 1' for number in range(count // 10)) + "}"
    paths = [path for path in sorted(folder.iterdir()) if path.suffix == ".json"]
    path = chance.choice(paths)
    if path.name == CONFIG and chance.random() < 0.5:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"graft_config": text})
    path.write_text(text)


def replace_by_special(folder: Path, chance: random.Random) -> None:
    """Put a pipe, a socket, a folder or a link in the place of a file."""
    path = chance.choice(sorted(folder.iterdir()))
    path.unlink()
    make_special(path, chance)


def make_special(path: Path, chance: random.Random) -> None:
    kind = chance.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.open(path.parent, os.O_RDONLY)
            # The path of a socket may be short only.
            server.bind(f"/proc/self/fd/{here}/{path.name}")
            os.close(here)
    elif kind == 4:
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/urandom")


def interrupt_save(folder: Path, chance: random.Random) -> None:
    """Leave what looks like a save that was interrupted after its decision."""
    decided = folder / ".saved"
    decided.mkdir()
    stale = "\n".join(chance.sample(["../x", CONFIG, WEIGHTS, "", "\0", "/etc/passwd", "config.json"], 4))
    (decided / ".stale").write_text(stale)
    if chance.random() < 0.7:
        make_special(decided / chance.choice([".stale2", CONFIG, WEIGHTS, "README.md"]), chance)
    if chance.random() < 0.3:
        (decided / ".stale").write_bytes(bytes(chance.randrange(256) for _ in range(100)))


def damage_bytes(folder: Path, chance: random.Random) -> None:
    """Flip bytes, cut or repeat a file."""
    path = chance.choice([path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")])
    path.write_bytes(chance.choice(BYTES)(path.read_bytes(), chance))
    if path.name == WEIGHTS and chance.random() < 0.7:
        # The copy in the header then stands alone.
        (folder / CONFIG).unlink()


def flip_bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def flip_in_header(data: bytes, chance: random.Random) -> bytes:
    if data[:1] in b"{-":
        return flip_bytes(data, chance)
    length = struct.unpack("<Q", data[:8])[0]
    return flip_bytes(data[: 8 + length], chance) + data[8 + length :]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def repeat(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + data[place // 2 :]


def change_digit(data: bytes, chance: random.Random) -> bytes:
    """Write another digit for one of the description's."""
    places = [place for place, byte in enumerate(data[:20_000]) if byte in b"0123456789"]
    if not places:
        return cut(data, chance)
    place = chance.choice(places)
    return data[:place] + bytes([chance.choice(b"0123456789")]) + data[place + 1 :]


def change_header(data: bytes, chance: random.Random) -> bytes:
    """Change the header of a safetensors file as JSON, or the description in it; its length stays true."""
    if data[:1] in b"{-":
        return json.dumps(put_junk(json.loads(data), chance)).encode()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    inside = header.get("__metadata__", {}).get("graft_config")
    if inside and chance.random() < 0.6:
        header["__metadata__"]["graft_config"] = json.dumps(put_junk(json.loads(inside), chance))
    else:
        put_junk(header, chance)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


BYTES = [flip_bytes, flip_in_header, cut, repeat, change_digit, change_header, change_header]


def places_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every entry of a nested value."""
    yield path
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield from places_in(child, (*path, key))


def put_junk(value: Any, chance: random.Random) -> Any:
    """Replace, remove or add one entry somewhere; the value is changed in place and returned."""
    paths = [path for path in places_in(value) if path]
    if not paths:
        return value
    path = chance.choice(paths)
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


GRAFT_CHANGES: list[Change] = [
    change_setting,
    change_setting,
    change_site,
    lengthen_plan,
    nest_operators,
    change_entry,
    change_entry,
    change_lora,
    change_values,
    change_tensors,
    change_code,
    change_proof,
    change_proof,
    grow_json,
    replace_by_special,
    interrupt_save,
    damage_bytes,
    damage_bytes,
]
MODEL_CHANGES: list[Change] = [
    change_model_config,
    change_model_config,
    change_model_config,
    change_model_entry,
    change_model_entry,
    change_model_setting,
    change_index,
    grow_json,
    replace_by_special,
    interrupt_save,
    damage_bytes,
    damage_bytes,
]
