"""What others may have put into a graft: each refused in words, with the model as it was before."""

import json
import os
import shutil
import struct

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import diffusers_graft as dg
from diffusers_graft.errors import FileError, GraftError, MismatchError

from ..models import SCHEDULER, batches, predict, tiny_dit
from .forging import CONFIG, PROOF, WEIGHTS, forge, read_mark, saved, untouched, write_mark

FIRST = "transformer_blocks.0.ff.graft.up.weight"


def raw_header(folder, change):
    """Change the header of the weights file as JSON, leaving the data behind it as they are."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edited(path, value):
    """A change of one entry of the description, by keys and indices."""

    def change(config, tensors):
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return lambda folder: forge(folder, change)


def retyped(folder):
    """Floats told as integers of the same bytes, in an honest file."""
    forge(folder, lambda config, tensors: tensors.update({FIRST: tensors[FIRST].view(torch.int32)}))


def header(name, **changes):
    return lambda folder: raw_header(folder, lambda header: header[name].update(changes))


def cut(count):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:count])


def flipped(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-40] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def pickled(folder):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    torch.save(tensors, folder / WEIGHTS)


def pickle_alone(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "graft_model.bin")
    (folder / WEIGHTS).unlink()


def tensor(change):
    return lambda folder: forge(folder, lambda config, tensors: change(tensors))


def described(text):
    return lambda folder: (folder / CONFIG).write_text(text)


def with_plan(text):
    return lambda folder: forge(folder, lambda config, tensors: text)


def proof(**tensors):
    return lambda folder: save_file(tensors, folder / PROOF)


OPERATOR = ("plan", "edits", 0, "operator")
DAMAGE = {
    "pickle in place of the weights": (pickled, "damaged"),
    "pickle beside nothing": (pickle_alone, "There is no graft_model"),
    "operator is a module path": (edited(OPERATOR, "os.system"), "no operator 'os.system'"),
    "operator is a path": (edited(OPERATOR, "../../evil"), "no operator"),
    "operator is a dunder": (edited(OPERATOR, "__init__"), "no operator '__init__'"),
    "operator is a private module": (edited(OPERATOR, "_checks"), "no operator '_checks'"),
    "operator is the base": (edited(OPERATOR, "base"), "no operator 'base'"),
    "operator is no name": (edited(OPERATOR, ["hyena_x"]), "no operator"),
    "setting is a dunder": (edited(("plan", "edits", 0, "__class__"), "os"), "no setting"),
    "setting of another type": (edited(("plan", "edits", 0, "expansion"), "__import__('os')"), "expansion"),
    "site path leaves the model": (edited(("plan", "edits", 0, "site", "path"), "__class__.mro"), "The plan edits"),
    "site of unknown entries": (edited(("plan", "edits", 0, "site", "__reduce__"), 1), "unknown entries"),
    "edits are no list": (edited(("plan", "edits"), 5), "not a graft plan"),
    "plan is no object": (edited(("plan",), "hyena_x"), "plan is str"),
    "history is no list": (edited(("history",), {}), "history is dict"),
    "checksum is a number": (lambda f: forge(f, lambda c, t: c.update(checksum=1), honest=False), "checksum is int"),
    "format is a word": (edited(("format",), "2"), "its format is '2'"),
    "format is true": (edited(("format",), True), "its format is True"),
    "format of the future": (edited(("format",), 99), "has format 99.*needs diffusers-graft .* or later"),
    "format of a future without versions": (
        lambda f: forge(f, lambda c, t: {"format": 99}),
        "needs diffusers-graft of a newer",
    ),
    "no format": (lambda f: forge(f, lambda c, t: c.pop("format") and c), "its format is None"),
    "header offsets overlap": (header(FIRST, data_offsets=[0, 8]), "damaged"),
    "header offsets beyond the file": (header(FIRST, data_offsets=[0, 1 << 40]), "damaged"),
    "header offsets negative": (header(FIRST, data_offsets=[-8, 8]), "damaged"),
    "header shape too large": (header(FIRST, shape=[1 << 40, 1 << 40]), "damaged"),
    "header dtype unknown": (header(FIRST, dtype="PICKLE"), "damaged"),
    "header longer than the file": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 50) + b"{}"),
        "damaged",
    ),
    "header without a graft": (lambda f: save_file({"x": torch.zeros(2)}, f / WEIGHTS), "holds no graft"),
    "extra tensor": (tensor(lambda t: t.update(evil=torch.zeros(2))), "holds evil"),
    "extra tensor in a part": (tensor(lambda t: t.update({FIRST + "2": torch.zeros(2)})), "does not fit"),
    "missing tensor": (tensor(lambda t: t.pop(FIRST)), "does not fit"),
    "wrong shape": (tensor(lambda t: t.update({FIRST: t[FIRST].T.contiguous()})), "does not fit: it is \\(16, 96\\)"),
    "wrong dtype": (retyped, "does not fit: it is torch.int32"),
    "shared tensor of another shape": (
        tensor(lambda t: t.update({"proj_out_1.weight": torch.zeros(3)})),
        "does not fit",
    ),
    "not a number": (tensor(lambda t: t[FIRST].view(-1)[:1].fill_(float("nan"))), "not finite"),
    "infinite": (tensor(lambda t: t[FIRST].view(-1)[3:4].fill_(float("inf"))), "not finite"),
    "flipped bit": (flipped, "edited or damaged"),
    "retyped without a new checksum": (
        lambda f: raw_header(f, lambda h: h[FIRST].update(dtype="I32")),
        "edited or damaged",
    ),
    "truncated": (cut(-100), "damaged"),
    "truncated header": (cut(100), "damaged"),
    "seven bytes": (cut(7), "damaged"),
    "empty": (cut(0), "damaged"),
    "description edited": (described('{"format": 2}'), "was edited"),
    "description is half": (described("{"), "not JSON"),
    "description is a list": (described("[]"), "no JSON object"),
    "description is a number": (described("1"), "no JSON object"),
    "description holds NaN": (described('{"format": NaN}'), "not JSON"),
    "description has digits without end": (described("9" * 5000), "not JSON"),
    "description is not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "not text"),
    "description is nested deep": (described('{"a":' * 100 + "1" + "}" * 100), "nested deeper"),
    "description is nested very deep": (described("[" * 200_000), "nested deeper|not JSON"),
    "description is huge": (lambda f: os.truncate(f / CONFIG, 1 << 26), "more than 33,554,432 bytes"),
    "header description is no JSON": (with_plan("import os"), "not JSON"),
    "header description is nested deep": (with_plan('{"a":' * 100 + "1" + "}" * 100), "nested deeper"),
    "proof is a pickle": (lambda f: torch.save({"output": torch.zeros(1)}, f / PROOF), "damaged"),
    "proof without output": (proof(x=torch.zeros(1)), "is not a proof"),
    "proof of other outputs": (proof(output=torch.zeros(2)), "output of shape"),
    "proof of inputs that do not fit": (
        proof(**{"output": torch.zeros(2), "inputs.hidden_states": torch.zeros(3)}),
        "does not take",
    ),
    "proof with labels beyond": (
        proof(**{"output": torch.zeros(2), "inputs.class_labels": torch.tensor([999])}),
        "does not take",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A graft, a graft with LoRA and a whole model, saved once for all tests."""
    folder = tmp_path_factory.mktemp("sound")
    saved(folder / "graft")
    whole(folder / "whole", max_shard_size="20KB")
    model = tiny_dit()
    model.set_graft({"self_attention[1::2]": "neighborhood"})
    lora = LoraConfig(r=2, target_modules=["to_q", "proj"])
    settings = dg.FinetuneConfig(steps=2, train="operators", lora=lora, progress=False)
    dg.finetune(model, batches(), settings, noise_scheduler=SCHEDULER)
    model.save_graft(folder / "lora")
    return folder


@pytest.fixture
def trained(sound, tmp_path):
    return shutil.copytree(sound / "lora", tmp_path / "lora")


@pytest.mark.parametrize("name", DAMAGE)
def test_it_is_refused_and_the_model_is_untouched(name, sound, tmp_path):
    damage, words = DAMAGE[name]
    shutil.copytree(sound / "graft", tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    model = tiny_dit()

    def refused():
        with pytest.raises(GraftError, match=words):
            model.load_graft(tmp_path)

    untouched(model, refused)


def test_a_refusal_after_the_model_was_cast_leaves_no_trace(sound, tmp_path):
    shutil.copytree(sound / "graft", tmp_path, dirs_exist_ok=True)
    (tmp_path / PROOF).write_bytes(b"x")
    model = tiny_dit()
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}

    def refused():
        with pytest.raises(FileError, match="damaged"):
            model.load_graft(tmp_path, dtype=torch.bfloat16)

    untouched(model, refused)
    assert model.dtype == torch.float32
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == buffers


LAYER = "transformer_blocks.0.attn1.to_q"
LORA_DAMAGE = {
    "rank of another kind": edited(("lora", "layers", LAYER, "r"), "2"),
    "rank without end": edited(("lora", "layers", LAYER, "r"), 10**9),
    "rank of other tensors": edited(("lora", "layers", LAYER, "r"), 3),
    "layer that is none": edited(("lora", "layers", "transformer_blocks.9.to_q"), {"r": 2, "alpha": 8}),
    "layer that is a pattern": edited(("lora", "layers", "(a+)+$"), {"r": 2, "alpha": 8}),
    "no layers": edited(("lora", "layers"), {}),
    "dropout is a word": edited(("lora", "lora_dropout"), "os"),
    "no description": edited(("lora",), None),
    "missing tensor": tensor(lambda t: t.pop(f"{LAYER}.lora_A.weight")),
    "shape": tensor(lambda t: t.update({f"{LAYER}.lora_A.weight": torch.zeros(2, 2)})),
}


@pytest.mark.parametrize("name", LORA_DAMAGE)
def test_a_lora_that_does_not_fit_leaves_nothing_behind(name, trained):
    LORA_DAMAGE[name](trained)
    model = tiny_dit()

    def refused():
        with pytest.raises(GraftError, match="LoRA"):
            model.load_graft(trained)

    untouched(model, refused)


def test_pefts_settings_that_name_code_are_not_read(trained):
    """`megatron_core` is a module that peft would import."""
    edited(("lora", "megatron_core"), "antigravity")(trained)
    edited(("lora", "megatron_config"), {"x": 1})(trained)
    model = tiny_dit()
    model.load_graft(trained)
    assert not [name for name in __import__("sys").modules if name == "antigravity"]


def test_the_wrong_base_leaves_the_model_as_it_was(tmp_path):
    saved(tmp_path)
    model = tiny_dit()
    with torch.no_grad():
        model.proj_out_1.weight[0, 0] += 1

    def refused():
        with pytest.raises(MismatchError, match="allow_base_mismatch=True"):
            model.load_graft(tmp_path)

    untouched(model, refused)


def whole(folder, **settings):
    model = tiny_dit()
    model.set_graft({"self_attention[1::2]": "hyena_x"})
    model.save_pretrained(folder, **settings)
    return model


def indexed(change):
    def damage(folder):
        path = folder / "diffusion_pytorch_model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def elsewhere(name):
    return indexed(lambda mapped: mapped.update(dict.fromkeys(mapped, name)))


def linked_out(folder):
    shard = sorted(folder.glob("*00001-of*"))[0]
    outside = folder.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)


def in_config(name, value):
    def damage(folder):
        write_mark(folder, {**read_mark(folder), "model": None}, **{name: value})

    return damage


def as_pickle(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")


def setting(**row):
    def damage(folder):
        write_mark(folder, {**read_mark(folder), "settings": [row]})

    return damage


TIME = "transformer_blocks.0.norm1.emb.time_proj"
WHOLE_DAMAGE = {
    "index leaves upwards": (elsewhere("../outside.safetensors"), "not a plain file name"),
    "index is absolute": (elsewhere("/etc/passwd"), "not a plain file name"),
    "index names something hidden": (elsewhere(".saved"), "not a plain file name"),
    "index names a number": (elsewhere(5), "not a plain file name"),
    "index names a missing file": (elsewhere("other.safetensors"), "There is no other"),
    "index names a link that leaves": (linked_out, "leads out of the folder"),
    "index lacks a tensor": (indexed(lambda mapped: mapped.pop("proj_out_1.weight")), "does not fit the files"),
    "index is empty": (indexed(lambda mapped: mapped.clear()), "no weight_map"),
    "class of another library": (in_config("_class_name", "os.system"), "does not have"),
    "class is a dunder": (in_config("_class_name", "__class__"), "does not have"),
    "class is no model": (in_config("_class_name", "DDIMScheduler"), "does not have"),
    "class is a list": (in_config("_class_name", ["x"]), "does not have"),
    "class without sites": (in_config("_class_name", "AutoencoderKL"), "encoder.conv_in.weight is missing"),
    "more layers than weights": (in_config("num_layers", 5), "do not fit"),
    "layers without end": (in_config("num_layers", 10**9), "asks for more than [\\d,]+ parts"),
    "no model of that size": (in_config("attention_head_dim", -8), "cannot be built"),
    "config edited": (lambda f: write_mark(f, read_mark(f), num_layers=3), "was edited"),
    "config lost": (
        lambda f: (f / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}'),
        "describes no graft",
    ),
    "pickles": (as_pickle, "pickles can run code"),
    "truncated shard": (lambda f: os.truncate(sorted(f.glob("*.safetensors"))[0], 500), "damaged"),
    "setting of another attribute": (setting(path=TIME, attribute="__class__", value=0), "does not fit"),
    "setting of another module": (
        setting(path="proj_out_1", attribute="downscale_freq_shift", value=0),
        "none that a file may",
    ),
    "setting of another kind": (
        setting(path=TIME, attribute="downscale_freq_shift", value="0"),
        "none that a file may",
    ),
}


@pytest.mark.parametrize("name", WHOLE_DAMAGE)
def test_a_whole_model_is_refused(name, sound, tmp_path):
    damage, words = WHOLE_DAMAGE[name]
    shutil.copytree(sound / "whole", tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    damage(tmp_path / "model")
    with pytest.raises(GraftError, match=words):
        dg.load_pretrained(tmp_path / "model")


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path):
    """Mapped memory would crash the process once the file is written over."""
    whole(tmp_path)
    model = dg.load_pretrained(tmp_path)
    before = predict(model)
    os.truncate(tmp_path / "diffusion_pytorch_model.safetensors", 10)
    assert torch.equal(predict(model), before)


def test_subfolders_stay_inside(tmp_path):
    saved(tmp_path / "graft")
    for subfolder in ("../graft", "/etc"):
        with pytest.raises(FileError, match="leads out"):
            tiny_dit().load_graft(tmp_path / "graft", subfolder=subfolder)
    tiny_dit().load_graft(tmp_path, subfolder="graft")
