"""Training sets that a pipeline samples itself."""

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.training.batches import Shared, ShuffledBatches, make_batches

from ..models import SCHEDULER
from .pipelines import SETTINGS, dit_pipeline, encode_prompt, flow_pipeline, lumina_pipeline, pixart_pipeline, tiny_vae


def test_a_label_pipeline_makes_its_training_set(tmp_path):
    pipe, seen = dit_pipeline(), []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, *a, **k: (seen.append(latents), decode(latents, *a, **k))[1]
    found = dg.data.from_pipeline(pipe, [3, 1, 4], 7, tmp_path, guidance_scale=2.0, **SETTINGS)
    assert len(found) == 7
    assert [int(found[i]["class_labels"]) for i in range(7)] == [3, 1, 4, 3, 1, 4, 3]
    torch.testing.assert_close(found[2]["sample"], 0.3 * seen[1][0])
    assert found[-1]["sample"].shape == (4, 8, 8)
    graft = dg.build_graft(pipe.transformer, dg.plan_graft(pipe.transformer, {"self_attention[1]": "hyena_x"}))
    config = dg.DistillConfig(steps=2, progress=False)
    dg.distill(pipe.transformer, graft, make_batches(found, 4, 0), config, noise_scheduler=SCHEDULER)


def test_a_prompt_pipeline_gives_the_conditioning_of_the_prompt_itself(tmp_path):
    pipe = pixart_pipeline()
    found = dg.data.from_pipeline(
        pipe, ["one", "three"], 4, tmp_path, height=8, width=8, use_resolution_binning=False, **SETTINGS
    )
    assert [found[i]["encoder_hidden_states"].unique().tolist() for i in range(4)] == [[3.0], [5.0]] * 2
    assert found[0]["encoder_attention_mask"].all()
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())
    batch = next(iter(ShuffledBatches(found, 2, 0)))
    graft = dg.build_graft(pipe.transformer, dg.plan_graft(pipe.transformer, {"self_attention[1]": "hyena_x"}))
    dg.distill(pipe.transformer, graft, [batch], dg.DistillConfig(steps=1, progress=False), noise_scheduler=SCHEDULER)


@pytest.mark.parametrize("name", ["FluxTransformer2D", "WanTransformer3D"])
def test_sets_of_flow_pipelines_are_what_their_models_train_on(name, tmp_path):
    pipe, flow, arguments = flow_pipeline(name)
    pipe.set_progress_bar_config(desc="mine")
    found = dg.data.from_pipeline(pipe, ["one", "three"], 3, tmp_path, **SETTINGS, **arguments)
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert [found[i]["encoder_hidden_states"].unique().tolist() for i in range(3)] == [[3.0], [5.0], [3.0]]
    pipe.transformer.set_graft({"block_pair[0]": "parallel"})
    dg.finetune(
        pipe.transformer, make_batches(found, 3, 0), dg.FinetuneConfig(steps=1, progress=False), noise_scheduler=flow
    )


def test_a_pipeline_whose_model_takes_more_than_latents_is_refused(tmp_path):
    pipe = pixart_pipeline()
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda hidden_states, **kwargs: forward(hidden_states[:, :4], **kwargs)
    pipe.scheduler.scale_model_input = lambda latents, timestep: torch.cat([latents, latents], dim=1)
    with pytest.raises(TrainingError, match="not a clean sample"):
        dg.data.from_pipeline(pipe, ["one"], 1, tmp_path, height=8, width=8, use_resolution_binning=False, **SETTINGS)


def test_prompts_are_found_where_a_pipeline_puts_them_first(tmp_path):
    pipe = lumina_pipeline()
    found = dg.data.from_pipeline(
        pipe, ["one", "three"], 3, tmp_path, height=16, width=16, proportional_attn=False, **SETTINGS
    )
    assert [found[i]["encoder_hidden_states"].unique().tolist() for i in range(3)] == [[3.0], [5.0], [3.0]]
    assert found[0]["encoder_mask"].all()
    assert pipe.encode_prompt is encode_prompt


def train_one_step(denoiser, found, scheduler):
    """Stage two on a set, through torch's own way to make batches of it."""
    denoiser.set_graft({"self_attention[0]": "linear_attention"})
    loader = torch.utils.data.DataLoader(found, batch_size=3)
    config = dg.FinetuneConfig(steps=1, warmup=0, progress=False)
    (loss,) = dg.finetune(denoiser, loader, config, noise_scheduler=scheduler)
    assert loss == loss
    return next(iter(loader))


def test_numbers_and_tuples_that_all_samples_share_reach_the_denoiser_as_they_are(tmp_path):
    pipe = lumina_pipeline()
    call = {"height": 16, "width": 16, "guidance_scale": 1.0, **SETTINGS}
    found = dg.data.from_pipeline(pipe, ["one", "three"], 3, tmp_path, **call)
    told = {}
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: told.update(kwargs), with_kwargs=True)
    train_one_step(pipe.transformer, found, pipe.scheduler)
    assert told["cross_attention_kwargs"] == {"base_sequence_length": 16}
    assert told["image_rotary_emb"].shape[0] > 3
    assert torch.equal(told["image_rotary_emb"], dg.data.Shards(tmp_path)[0]["image_rotary_emb"].value)


class Prompted(DiffusionPipeline):
    """Gives its denoiser whatever a test says, in two steps, with guidance in one call of twice the rows."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, prompt, output_type, generator, give, prompts_first=False, callback_on_step_end=None):
        latents = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        numbers = torch.tensor([float(len(text)) for text in prompt])
        nothing = torch.zeros(len(prompt))
        numbers = torch.cat([numbers, nothing] if prompts_first else [nothing, numbers])
        for step in (1, 0):
            self.unet(torch.cat([latents] * 2), torch.tensor(step), **give(numbers, step))
            latents = latents / 2
            callback_on_step_end(self, step, step, {"latents": latents})
        return (latents.flatten(1),)


class Denoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states=None,
        layers=None,
        shapes=None,
        added=None,
        size=1,
        txt_ids=None,
        **_,
    ):
        return (sample,)


def draw(give, tmp_path, prompts=("one", "three", "seventh"), **call):
    pipe = Prompted(Denoiser(), DDIMScheduler())
    arguments = {"batch_size": 2, "progress": False, "give": give, **call}
    return dg.data.from_pipeline(pipe, list(prompts), len(prompts), tmp_path, **arguments)


def states(numbers, *shape):
    return numbers.view(-1, *[1] * len(shape)).expand(-1, *shape)


@pytest.mark.parametrize(
    ("name", "give", "expected"),
    [
        ("encoder_hidden_states", lambda n, _: states(n, 5, 2), torch.tensor([3.0, 5.0, 7.0])),
        (
            "encoder_hidden_states_llama3",
            lambda n, _: states(n, 6, 5, 2).transpose(0, 1),
            torch.tensor([3.0, 5.0, 7.0]),
        ),
        ("added", lambda n, _: {"text_embeds": states(n, 2)}, {"text_embeds": torch.tensor([3.0, 5.0, 7.0])}),
        (
            "layers",
            lambda n, _: [states(n, 5, 2), -states(n, 4, 2)],
            [torch.tensor([3.0, 5, 7]), -torch.tensor([3.0, 5, 7])],
        ),
        ("shapes", lambda n, _: [[(1, 4, 4)]] * len(n), [[(1, 4, 4)]] * 3),
        ("layers", lambda n, _: [one.expand(int(one) + 9, 2) for one in n], [3.0, 5.0, 7.0]),
        ("size", lambda *_: 2.5, 2.5),
        ("txt_ids", lambda *_: torch.ones(4, 3), torch.ones(4, 3)),
        (
            "encoder_hidden_states",
            lambda n, _: states(n, 5, 2).repeat_interleave(4, 0),
            torch.tensor([3.0, 5, 7]).repeat_interleave(4),
        ),
    ],
)
def test_conditioning_of_every_form_comes_back_in_the_batches(name, give, expected, tmp_path):
    found = draw(lambda numbers, step: {name: give(numbers, step)}, tmp_path)
    assert found[1]["sample"].shape == (4, 8, 8)
    (batch,) = torch.utils.data.DataLoader(found, batch_size=3)

    def mean(value):
        if isinstance(value, Shared):
            return value.value
        if isinstance(value, dict):
            return {key: mean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [mean(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        if name.endswith("llama3"):
            assert value.shape == (6, 3, 5, 2)
            value = value.transpose(0, 1)
        return value.flatten(1).mean(1) if value.ndim > 2 or name == "added" else value.mean().item()

    torch.testing.assert_close(mean(batch[name]), expected)


@pytest.mark.parametrize("ragged", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("prompts_first", [False, True], ids=["last", "first"])
def test_rows_of_prompts_are_told_from_those_of_no_prompt_wherever_they_are(prompts_first, ragged, tmp_path):
    def give(numbers, step):
        rows = [one.expand(int(one) + 1, 2) for one in numbers] if ragged else states(numbers, 5, 2)
        return {"layers" if ragged else "encoder_hidden_states": rows}

    found = draw(give, tmp_path, ("one", "three", "seventh", "ninety"), prompts_first=prompts_first)
    for index, expected in enumerate([3.0, 5.0, 7.0, 6.0]):
        value = found[index]["layers"].value if ragged else found[index]["encoder_hidden_states"]
        assert value.unique().tolist() == [expected]


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda n, step: {"added": {"noise": states(n, 2) + step}}, "another added in every step"),
        (lambda n, _: {"size": float(n.max())}, "size .*differs from one call of the pipeline to the next"),
        (lambda n, _: {"encoder_hidden_states": torch.zeros(5, 2)}, "cannot be divided among them"),
    ],
)
def test_what_is_no_conditioning_of_a_sample_is_refused(give, words, tmp_path):
    with pytest.raises(TrainingError, match=words):
        draw(give, tmp_path)
    assert not list(tmp_path.glob("samples-*-00000003*"))


def test_conditioning_that_a_set_cannot_hold_is_refused_and_the_folder_is_free_for_another_try(tmp_path):
    cache = object()
    with pytest.raises(TrainingError, match="gives its denoiser shapes=<object .* holds tensors, numbers and texts"):
        draw(lambda *_: {"shapes": cache}, tmp_path)
    assert len(draw(lambda *_: {"shapes": None}, tmp_path)) == 3


def test_a_pipeline_without_a_denoiser_is_refused(tmp_path):
    class Other(DiffusionPipeline):
        def __init__(self, vae):
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(TrainingError, match="Other has no transformer and no unet; its parts are: vae"):
        dg.data.from_pipeline(Other(tiny_vae()), ["one"], 1, tmp_path)


@pytest.mark.parametrize("conditions", ["one", []])
def test_conditions_are_a_list(conditions, tmp_path):
    with pytest.raises(TrainingError, match="a list of prompts"):
        dg.data.from_pipeline(None, conditions, 1, tmp_path)
