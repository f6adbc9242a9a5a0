"""Every example runs at its smallest, and does what its first lines say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import FileError
from diffusers_graft.operators.conformance.suite import example_site
from diffusers_graft.testbed import scenes

FOLDER = Path(__file__).parents[2] / "examples"
ELSEWHERE = {"text_to_image"}  # tests/testbed/test_text_to_image.py


@pytest.fixture
def load(monkeypatch):
    """Import an example by its name."""

    def loaded(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        # Operators are asked for the module that they were defined in.
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


GRAFTS = {
    "distill_and_share": "loads back to exactly the same outputs",
    "own_operator": "row_window(reach=3) passed",
    "plan_under_budget": "and the survey for other budgets",
    "train_and_resume": "how it went stands there",
    "unet": "loads back to exactly the same outputs",
    "video_model": "self_attention[3]: loss",
}
OPTIONS = {"plan_under_budget": {"measure": "parameters"}}


@pytest.mark.parametrize("name", GRAFTS)
def test_an_example_saves_a_graft(name, load, tmp_path, capsys):
    load(name).main(str(tmp_path), steps=3, **OPTIONS.get(name, {}))
    assert GRAFTS[name] in capsys.readouterr().out
    assert (tmp_path / "graft_model.safetensors").exists()


def test_what_people_use_beside_a_graft_moves_its_output_as_it_should(load, tmp_path):
    moved = load("together").main(str(tmp_path))
    assert 0 < moved["graft"] < moved["graft + LoRA"] < moved["graft + ControlNet"]
    # The second step of a cache repeats the first on the same input, and offloading changes no number.
    assert moved["graft + LoRA + cache"] == pytest.approx(moved["graft + LoRA"], rel=1e-5)
    assert moved["graft + LoRA + offloading"] == pytest.approx(moved["graft + LoRA"], rel=1e-5)
    assert moved["graft + float8 storage"] == pytest.approx(moved["graft"], abs=0.05)


def test_two_packs_go_onto_one_base_and_each_is_smaller_than_its_weights(load, tmp_path, capsys):
    load("skill_packs").main(str(tmp_path), steps=1)
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.split()[1]) < 0.5 for line in lines[:2]] == [True, True]
    assert sum(line.startswith("pack ") for line in lines) == 4


def test_reference_attention_draws_closer_to_the_reference(load, tmp_path, capsys):
    load("reference_attention").main(str(tmp_path), size=64, steps=3)
    plain, fused = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:2])
    assert fused < plain
    assert (tmp_path / "pictures.png").exists()


def test_reference_attention_is_softmax_over_own_tokens_and_kept_matches(load):
    operator_class = load("reference_attention").ReferenceAttention
    operator = operator_class.Config(similarity=0.5, tolerance=1.5, reach=1.0).build(example_site("self_attention"))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 12, 4, generator=generator) for _ in range(3))
    hidden = torch.randn(2, 12, 12, generator=generator)
    # Some tokens of the drawn picture look like one of the reference, of which one is too far from where it leads back.
    hidden[1, :4] = hidden[0, :4] + 0.01
    context = Context(grid=Grid(height=3, width=4), hidden_states=hidden)
    output = operator(query, key, value, context)
    expected = by_definition(operator.config, query, key, value, hidden, width=4)
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output[1], softmax(query[1], key[1], value[1]))


def softmax(query, key, value):
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value


def by_definition(config, query, key, value, hidden, width):
    """Token by token: the drawn picture's softmax, and beside it the matches that a query is close to."""

    def cosine(one, other):
        return (one @ other / one.norm() / other.norm()).item()

    def distance(one, other):
        return ((one // width - other // width) ** 2 + (one % width - other % width) ** 2) ** 0.5

    tokens = range(query.shape[2])
    matches = {}
    for token in tokens:
        match = max(tokens, key=lambda other: cosine(hidden[0, token], hidden[1, other]))
        back = max(tokens, key=lambda other: cosine(hidden[0, other], hidden[1, match]))
        is_alike = cosine(hidden[0, token], hidden[1, match]) > config.similarity
        if is_alike and distance(token, back) < config.tolerance:
            matches[token] = match
    assert 4 <= len(matches) < len(tokens)
    output = softmax(query, key, value)
    for token in tokens:
        near = [own for own, match in matches.items() if distance(token, match) <= config.reach]
        keys = torch.cat([key[1], key[0][:, near]], dim=1)
        values = torch.cat([value[1], value[0][:, near]], dim=1)
        output[1, :, token : token + 1] = softmax(query[1, :, token : token + 1], keys, values)
    return output


def test_every_use_of_a_grafted_pipeline_is_scored_before_and_after_and_none_twice(
    load, tmp_path, capsys, monkeypatch
):
    example = load("use_grafted_pipeline")
    arguments = ["--brief", "--output", str(tmp_path)]
    example.main(arguments)
    table = capsys.readouterr().out
    rows = json.loads((tmp_path / "uses.json").read_text())["rows"]
    assert list(rows) == list(example.USES)
    for row in rows.values():
        assert 0 <= row["low"] <= row["original"] <= row["high"] <= 1
        assert 0 <= row["grafted"] <= 1
    monkeypatch.delattr(example, "measure")
    example.main(arguments)
    assert capsys.readouterr().out == table
    with pytest.raises(SystemExit, match="Give another --output"):
        example.main(["--output", str(tmp_path)])


def test_uses_of_a_graft_or_a_pipeline_that_was_trained_anew_are_other_rows(load, tmp_path, monkeypatch):
    example = load("use_grafted_pipeline")
    path = tmp_path / "graft_model.safetensors"
    path.write_bytes(b"once")
    once = example.describe_protocol(example.BRIEF, tmp_path)
    assert example.describe_protocol(example.BRIEF, tmp_path) == once
    path.write_bytes(b"anew")
    assert example.describe_protocol(example.BRIEF, tmp_path) != once
    own = example.describe_protocol(example.BRIEF, None)
    monkeypatch.setattr(example.scenes, "weights_version", lambda: "of another training")
    assert example.describe_protocol(example.BRIEF, None) != own
    with pytest.raises(FileError, match=r"no graft_model\.safetensors in .*no such folder"):
        example.describe_protocol(example.BRIEF, tmp_path / "no such folder")


def test_the_loop_of_that_example_draws_what_the_pipeline_does_and_keeps_what_it_should(load, monkeypatch):
    example = load("use_grafted_pipeline")
    pipeline = scenes.pipeline()
    line = scenes.load_prompts()[0]
    noise = example.sample_noise((1, 12, 8, 8))
    # A solver of the first order takes Euler's steps.
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1)
    settings = {"height": 64, "width": 64, "use_resolution_binning": False, "clean_caption": False}
    settings |= {"guidance_scale": example.GUIDANCE, "max_sequence_length": 32, "num_inference_steps": 3}
    expected = pipeline(line["prompt"], latents=noise, output_type="pt", **settings).images * 2 - 1
    scheduler = FlowMatchEulerDiscreteScheduler()
    # The pipeline's timesteps are rounded ones.
    steps = pipeline.scheduler
    scheduler.set_timesteps(sigmas=steps.sigmas[:-1].tolist(), timesteps=steps.timesteps.double().tolist())
    drawn = example.denoise(pipeline, scheduler, [line["prompt"]], noise)
    assert torch.allclose(drawn.clamp(-1, 1), expected, atol=1e-3)
    decoded = []
    decode = pipeline.vae.decode

    def note_latents(latents):
        decoded.append(latents * pipeline.vae.config.scaling_factor)
        return decode(latents)

    monkeypatch.setattr(pipeline.vae, "decode", note_latents)
    clean = example.encode_fitting_pictures(pipeline, [line], 64)
    example.draw_from_pictures(pipeline, [line], example.BRIEF, strength=0.0)
    assert torch.allclose(decoded[-1], clean, atol=1e-5)
    example.inpaint(pipeline, [line], example.BRIEF)
    assert torch.allclose(decoded[-1][..., :4], clean[..., :4], atol=1e-5)
    assert not torch.allclose(decoded[-1][..., 4:], clean[..., 4:], atol=0.1)


@pytest.mark.parametrize("rules", [{}, {"self_attention[1::2]": "neighborhood"}])
def test_the_cache_of_that_example_computes_every_second_attention_and_leaves_no_trace(load, rules):
    example = load("use_grafted_pipeline")
    pipeline = scenes.pipeline()
    if rules:
        pipeline.transformer.set_graft(rules)
    lines = scenes.load_prompts()[:1]
    before = example.draw_with()(pipeline, lines, example.BRIEF)
    calls = []
    query = pipeline.transformer.transformer_blocks[1].attn1.to_q
    handle = query.register_forward_hook(lambda *arguments: calls.append(1))
    cached = example.draw_with_cache(pipeline, lines, example.BRIEF)
    handle.remove()
    assert len(calls) == example.BRIEF.steps / 2
    assert not torch.allclose(cached, before, atol=0.01)
    assert torch.equal(example.draw_with()(pipeline, lines, example.BRIEF), before)


def test_every_example_is_run_and_says_how_to_run_it():
    names = {path.stem for path in FOLDER.glob("*.py")}
    tested = {*GRAFTS, *ELSEWHERE, "together", "skill_packs", "reference_attention", "use_grafted_pipeline"}
    assert names == tested
    for name in names:
        text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert f"python examples/{name}.py" in text.split('"""')[1], name
