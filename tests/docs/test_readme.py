"""Commands and code of the README and of CONTRIBUTING, as they are written; what takes minutes is made small.

Repositories of the Hub are a local Hub's, and the large pretrained models the testbed's: a stand-in each.
"""

import dataclasses
import re
import subprocess

import pytest
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PixArtSigmaPipeline
from PIL import Image

import diffusers_graft as dg
from diffusers_graft import testbed

from ..serialization.test_upload import hub, only_regular  # noqa: F401
from .commands import ROOT, commands_of, python_of, refusal_of

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "hub_cards/example.md",
    "examples/benchmarks/README.md",
    "docs/hub_library.md",
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_commands_of_a_document_are_known(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not {" ".join(words): refusal_of(words) for words in commands_of(text) if refusal_of(words)}


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "diffusers-graft fly",
        "python -m benchmarks imports --wings 2",
        "python -m benchmarks nothing",
        "python examples/nothing.py",
        "python -m pytest tests/nothing",
        'pip install "diffusers-graft[nothing]"',
        "python -c 'import'",
    ],
)
def test_a_command_that_is_not_known_is_found(line):
    (words,) = commands_of(f"Run `{line}` first.")
    assert refusal_of(words)
    assert commands_of(f"```\n{line}  # why\n```\n") == [words]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Stand-ins for what is downloaded, and small numbers for what takes hours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    load = DiTTransformer2DModel.from_pretrained.__func__

    def from_pretrained(cls, source, **settings):
        if source == "facebook/DiT-XL-2-256":
            return testbed.load()
        return load(cls, source, **settings)

    monkeypatch.setattr(DiTTransformer2DModel, "from_pretrained", classmethod(from_pretrained))
    load_pipeline = PixArtSigmaPipeline.from_pretrained.__func__

    def pipeline_from_pretrained(cls, source, **settings):
        if str(source).startswith("PixArt-alpha/"):
            return testbed.scenes.pipeline()
        return load_pipeline(cls, source, **settings)

    monkeypatch.setattr(PixArtSigmaPipeline, "from_pretrained", classmethod(pipeline_from_pretrained))
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *where, **settings: self)
    draw = dg.data.from_pipeline

    def from_pipeline(pipe, conditions, n, folder):
        size = {"height": 32, "width": 32, "use_resolution_binning": False, "clean_caption": False}
        return draw(pipe, conditions, 4, folder, num_inference_steps=1, max_sequence_length=32, **size)

    monkeypatch.setattr(dg.data, "from_pipeline", from_pipeline)
    arguments = dg.GraftTrainingArguments

    def make_arguments(finetune=None, **settings):
        one = dg.DistillConfig(steps=1, warmup=0)
        two = dataclasses.replace(finetune or dg.FinetuneConfig(), steps=1, warmup=0)
        settings["per_device_train_batch_size"] = 2
        return arguments(distill=one, finetune=two, **settings)

    monkeypatch.setattr(dg, "GraftTrainingArguments", make_arguments)
    letters = testbed.letter_batches
    monkeypatch.setattr(
        testbed,
        "letter_batches",
        lambda batch_size, seed, steps=None: letters(4, seed=seed, steps=None if steps is None else 1),
    )
    survey = dg.survey

    def survey_quickly(model, candidates, **settings):
        # A site of each kind; the others are alike.
        few = {key.replace("[:]", "[0]"): names for key, names in candidates.items()}
        return survey(model, few, rounds=2, **settings)

    monkeypatch.setattr(dg, "survey", survey_quickly)
    return tmp_path


@only_regular
def test_the_code_of_the_readme_runs(hub, small, monkeypatch):  # noqa: F811
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {}
    waiting = []
    for number, code in enumerate(python_of(text)):
        if code.startswith(("import", "from")):
            # A program of its own, of somebody with a pipeline, prompts, and pictures with captions.
            names["pipe"] = testbed.scenes.pipeline()
            folder = small / str(number)
            folder.mkdir()
            monkeypatch.chdir(folder)
            (folder / "prompts.txt").write_text("a photo of a ring\nthere is a hoop\n")
            if "PictureFolder" in code:
                (folder / "pictures").mkdir()
                Image.new("RGB", (32, 32)).save(folder / "pictures" / "a.png")
                (folder / "pictures" / "a.txt").write_text("a photo of a ring")
        assert all(int(steps) > dg.DistillConfig().warmup for steps in re.findall(r"Config\(steps=(\d+)", code))
        if "load_graft" in code and "me/" in code:
            # It loads what is pushed further below.
            waiting.append(code)
        else:
            run(code, names)
    assert "owner/pixart-hyena" in hub.repos
    for code in waiting:
        # Somebody else, who has the base.
        run(code, {"pipe": testbed.scenes.pipeline()})
    assert len(list(small.rglob("my-graft/graft_model.safetensors"))) == 2


def run(code, names):
    code = code.replace('"me/', '"owner/')  # an account of the local Hub
    code = re.sub(r"Config\(steps=\d+", "Config(steps=1, warmup=0, progress=False", code)
    # One site of a kind saves little.
    code = code.replace("flops=0.8", "flops=0.99")
    exec(compile(code, "<README>", "exec"), names)


def test_the_code_of_commands_in_contributing_runs():
    """Those that take no longer than their imports; its operator is taken at its word by test_plugins."""
    commands = commands_of((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert ["make", "test"] in commands
    assert "test-all" in subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
