"""Models that bring their own code: read where this package is not, where the reader says so."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, DiTTransformer2DModel
from diffusers.utils import dynamic_modules_utils

import diffusers_graft as dg
from diffusers_graft.errors import FileError, StateError
from diffusers_graft.inspection import example_inputs
from diffusers_graft.serialization.remote_code import operator_source as code

from ...models import predict, tiny_dit
from ...versions import trusts_no_folder
from ..pipelines import draw, pipeline
from ..test_lora import trained
from ..test_upload import TOKEN, cached, hub  # noqa: F401
from .test_operator_source import SOURCE, forget_shifted

RULES = {
    "self_attention[0]": "hyena_x",
    "self_attention[1]": "mamba2",
    "self_attention[2]": "hybrid",
    "self_attention[3]": "shifted",
    "feed_forward[::2]": {"operator": "mlp", "expansion": 2},
}
ELSEWHERE = """
import sys
for name in ("diffusers_graft", "peft", "jinja2", "einops"):
    sys.modules[name] = None
import torch
from diffusers import AutoModel, DiffusionPipeline, DiTTransformer2DModel

def refused(load, *folder):
    try:
        load(*folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without being trusted")

model_folder, pipe_folder, lora_folder, inputs, seen = sys.argv[1:]
refused(AutoModel.from_pretrained, model_folder)
refused(DiffusionPipeline.from_pretrained, pipe_folder)
model = AutoModel.from_pretrained(model_folder, trust_remote_code=True)
pipe = DiffusionPipeline.from_pretrained(pipe_folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
half = AutoModel.from_pretrained(model_folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
assert half.dtype == torch.bfloat16 and type(half).__name__ == type(model).__name__ == "DiTTransformer2DModel"
for save in (model.save_pretrained, pipe.save_pretrained):
    try:
        save(seen + "-again")
    except RuntimeError as error:
        assert "pip install diffusers-graft" in str(error)
    else:
        raise AssertionError("saved as something else")
try:
    AutoModel.from_pretrained(lora_folder, trust_remote_code=True)
except OSError as error:
    assert "pip install peft" in str(error), error
else:
    raise AssertionError("LoRA without peft")
del sys.modules["peft"]
lora = AutoModel.from_pretrained(lora_folder, trust_remote_code=True)
inputs = torch.load(inputs, weights_only=True)
with torch.no_grad():
    output, adapted = model(**inputs).sample, lora(**inputs).sample
images = pipe([1, 2], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
torch.save({"model": output, "lora": adapted, "pipeline": torch.from_numpy(images)}, seen)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and a pipeline with operators of ours and one that nobody else has, and their outputs."""
    root = tmp_path_factory.mktemp("contained")
    (root / "shifted.py").write_text(SOURCE)
    shifted = code._run("diffusers_graft.operators.shifted", root / "shifted.py", SOURCE.encode()).Shifted
    rules = {**RULES, "self_attention[3]": shifted.Config(shift=2)}
    model, pipe = tiny_dit(), pipeline()
    model.set_graft(rules)
    model.save_pretrained(root / "model", self_contained=True, max_shard_size="20KB")
    pipe.transformer.set_graft(rules)
    pipe.save_pretrained(root / "pipe", self_contained=True)
    forget_shifted()
    lora = trained(tiny_dit())
    lora.save_pretrained(root / "lora", self_contained=True)
    return root, {"model": predict(model), "lora": predict(lora), "pipeline": torch.from_numpy(draw(pipe))}


@trusts_no_folder
def test_people_without_this_package_read_it_bit_for_bit(folders, tmp_path):
    root, expected = folders
    torch.save(example_inputs(tiny_dit(), batch_size=2, seed=1), tmp_path / "inputs.pt")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    arguments = [
        str(path)
        for path in (
            tmp_path / "elsewhere.py",
            root / "model",
            root / "pipe",
            root / "lora",
            tmp_path / "inputs.pt",
            tmp_path / "seen.pt",
        )
    ]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, check=False
    )
    assert not result.returncode, result.stderr.decode()[-3000:]
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert [name for name in expected if not torch.equal(seen[name], expected[name])] == []
    assert not list(tmp_path.glob("diffusers_graft_*")), "what was unpacked is still there"


@pytest.fixture
def _modules_of_diffusers(tmp_path, monkeypatch):
    """Where diffusers copies code, which it then imports."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [
        name for name in sys.modules if name.startswith(("diffusers_modules", "diffusers_graft.operators.shifted"))
    ]:
        del sys.modules[name]


@pytest.mark.usefixtures("_modules_of_diffusers")
def test_people_with_this_package_read_it_as_any_other(folders):
    root, expected = folders
    with pytest.raises(FileError, match="'shifted' as code.*pass trust_remote_code=True"):
        dg.load_pretrained(root / "model")
    assert torch.equal(predict(dg.load_pretrained(root / "model", trust_remote_code=True)), expected["model"])
    model = AutoModel.from_pretrained(str(root / "model"), trust_remote_code=True)
    pipe = DiffusionPipeline.from_pretrained(root / "pipe", trust_remote_code=True)
    assert isinstance(model.graft, dg.Graft)
    assert isinstance(pipe.transformer.graft, dg.Graft)
    assert (draw(pipe) == expected["pipeline"].numpy()).all()


@pytest.mark.usefixtures("_modules_of_diffusers")
@pytest.mark.parametrize("hub", [False], indirect=True)
def test_over_the_hub(hub, tmp_path):  # noqa: F811
    """A repository of operators that everybody here has needs no pinning; diffusers asks for trust all the same."""
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    model.push_to_hub("owner/contained", self_contained=True, **TOKEN)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained("owner/contained", **cached(tmp_path))
    assert torch.equal(
        predict(AutoModel.from_pretrained("owner/contained", trust_remote_code=True, **cached(tmp_path))),
        predict(model),
    )
    pipe = pipeline()
    pipe.transformer.set_graft({"self_attention[0]": "hyena_x"})
    pipe.save_pretrained(str(tmp_path / "pipe"), self_contained=True, push_to_hub=True, repo_id="owner/pipe", **TOKEN)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained("owner/pipe", **cached(tmp_path))
    loaded = DiffusionPipeline.from_pretrained("owner/pipe", trust_remote_code=True, **cached(tmp_path))
    assert (draw(loaded) == draw(pipe)).all()


def test_the_code_is_for_reading(folders):
    """Every module stands in it as it stands here, and needs nothing that diffusers does not."""
    text = (folders[0] / "model" / "graft_code.py").read_text()
    assert not dynamic_modules_utils.get_relative_imports(folders[0] / "model" / "graft_code.py")
    (modules,) = [
        node.value for node in ast.parse(text).body if isinstance(node, ast.AnnAssign) and node.target.id == "MODULES"
    ]
    modules = ast.literal_eval(modules)
    for path in ("operators/hyena_x.py", "operators/mamba2.py", "serialization/load_model.py"):
        assert modules[path] == Path(dg.__file__).parent.joinpath(path).read_text()
    assert "operators/ttt.py" not in modules
    assert "cli.py" not in modules
    asked = {
        alias.name.partition(".")[0]
        for path, text in modules.items()
        for node in ast.parse(text).body
        if isinstance(node, ast.Import)
        # Kernels are imported where a backend asks for one.
        and not path.startswith("operators/kernels/")
        for alias in node.names
    }
    asked |= {
        node.module.partition(".")[0]
        for path, text in modules.items()
        for node in ast.parse(text).body
        if isinstance(node, ast.ImportFrom)
        and not node.level
        and path not in ("serialization/lora.py", "training/finetune/lora.py")
    }
    others = {name for name in asked - set(sys.stdlib_module_names) if not name.startswith("diffusers_graft_")}
    assert others <= {"torch", "diffusers", "safetensors", "huggingface_hub"}


def test_this_package_never_runs_the_code_that_lies_there(tmp_path):
    """Whoever has the package loads by it alone: the file may say what it likes."""
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    model.save_pretrained(tmp_path, self_contained=True)
    (tmp_path / "graft_code.py").write_text("raise SystemExit")
    for load in (dg.load_pretrained, DiTTransformer2DModel.from_pretrained):
        assert torch.equal(predict(load(tmp_path)), predict(model))


def test_an_ordinary_save_takes_the_code_away_again(tmp_path):
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    model.save_pretrained(tmp_path, self_contained=True)
    assert "AutoModel.from_pretrained(" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert "AutoModel" not in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_what_has_no_graft_has_nothing_to_bring(tmp_path):
    with pytest.raises(StateError, match="has a grafted model"):
        pipeline().save_pretrained(tmp_path / "pipe", self_contained=True)
    with pytest.raises(StateError, match="Only a grafted model"):
        tiny_dit().save_pretrained(tmp_path / "model", self_contained=True)
    assert not list(tmp_path.iterdir())
