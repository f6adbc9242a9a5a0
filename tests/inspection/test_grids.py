"""Geometry checked by physics: one latent patch is touched, and only its neighbours may notice.

A wrong order of text and image, or rows and columns swapped, would let tokens notice that have no right to.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.core.context import Grid
from diffusers_graft.errors import GeometryError
from diffusers_graft.injection.attention_processor import grafted_class
from diffusers_graft.inspection import families, read_context
from diffusers_graft.inspection import grids as geometry

from ..injection.families import MIXERS, NAMES, NO_MAIN_SITE, NO_SOFTMAX, main_sites
from .models import ROWS, Draw, exported, inputs_of, predict, tiny

NO_GRID = {
    "PriorTransformer": "its tokens are embeddings",
    "T5FilmDecoder": "its tokens are notes",
    "MiniMaxMusic3RVQDepthDecoder": "its tokens are codes",
    "RFD4ProteinaTransformer": "its tokens are residues",
    "SanaWMLTX2RefinerTransformer3DModel": "no argument tells the sides of its packed video",
}
WAVEFORMS = {
    "AceStepTransformer1DModel",
    "LongCatAudioDiTTransformer",
    "StableAudioDiTModel",
    "StableAudio3DiTModel",
    "MiniMaxMusic3Transformer1DModel",
}
ACROSS_FRAMES = {"TransformerTemporalModel": "it mixes the frames of one place"}
GRIDS = sorted(set(NAMES) - set(NO_SOFTMAX) - set(NO_MAIN_SITE) - set(NO_GRID) - WAVEFORMS - set(ACROSS_FRAMES))
CHANNELS_LAST = ("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel")
PLACE = (1, 4)  # row and column of the touched patch, off the diagonal so that a transposed grid shows


def latents_of(name, inputs):
    """The latents as a list of tensors [..., (F,) H, W], or [..., N, C] where they are packed, and their layout."""
    latents = inputs.get("hidden_states", inputs.get("x", inputs.get("vision_tokens")))
    return latents if isinstance(latents, list) else [latents]


def touch(name, inputs, grid):
    """Change the patch at PLACE, in the first frame; gives its raster index."""
    row, column = PLACE
    token = row * grid.width + column
    for latents in latents_of(name, inputs):
        if latents.dim() == 3:
            latents[:, latents.shape[1] - grid.tokens + token] += 1
        elif name == "JoyImageEditPlusTransformer3DModel":
            latents[:, token] += 1
        else:
            image = latents.movedim(-1, -3) if name in CHANNELS_LAST else latents
            high, wide = image.shape[-2] // grid.height, image.shape[-1] // grid.width
            area = (slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide))
            if name in CHANNELS_LAST:
                latents[:, 0, area[0], area[1]] += 1
            elif grid.frames > 1 and latents.dim() == 5:
                first_frame = latents[:, 0] if name in FRAMES_FIRST else latents[:, :, 0]
                first_frame[..., area[0], area[1]] += 1
            elif grid.frames > 1 and isinstance(inputs.get("hidden_states"), list):
                latents[:, 0, area[0], area[1]] += 1
            else:
                latents[..., area[0], area[1]] += 1
    return token


def touch_tokens(model, site, grid):
    """Change the token at PLACE where it enters an attention."""
    token = PLACE[0] * grid.width + PLACE[1]

    def hook(module, args, kwargs):
        return (
            args[0].index_add(1, torch.tensor([token]), torch.ones(len(args[0]), 1, args[0].shape[2])),
            *args[1:],
        ), kwargs

    seat = model.get_submodule(site.path)
    handle = seat.register_forward_pre_hook(hook, with_kwargs=True)
    seat._forward_pre_hooks.move_to_end(handle.id, last=False)
    return token


NORMALISED = ("DreamLiteTransformer2DModel", "Transformer2DModel")  # a GroupNorm over the image comes first
FRAMES_FIRST = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel", "AnyFlowTransformer3DModel")


def record(model, name, inputs, path):
    """Image stream in and out of one attention, [N, D] of the first sample each."""
    seen = []

    def hook(module, args, kwargs, output):
        stream = (
            args[1] if name == "Cosmos3OmniTransformer" else kwargs.get("hidden_states", args[0] if args else None)
        )
        if isinstance(output, tuple):
            output = output[1] if name == "Cosmos3OmniTransformer" else output[0]
        batched = (tensor if tensor.dim() > 2 else tensor[None] for tensor in (stream, output))
        seen.append([tensor.detach()[0].flatten(1).clone() for tensor in batched])

    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def changed(one, other):
    return {int(index) for index in (one != other).any(-1).nonzero()}


def near(token, grid):
    """Tokens whose 3 x 3 (x 3) window, shifted inward at borders, holds a token."""
    operator = dg.operators.get("neighborhood")
    site = dg.Site(kind="self_attention", index=0, path="", width=8, heads=2, head_width=4)
    window = operator.Config().build(site)
    return {query for query in range(grid.tokens) if token in window.receptive_field(query, grid)}


@pytest.mark.parametrize("name", GRIDS)
def test_a_touched_patch_reaches_its_neighbours_alone(name):
    model = tiny(name)
    grid = read_context(model, (), inputs_of(name)).grid
    expected = Draw()
    assert (grid.height, grid.width) == (expected.height, expected.width)
    site = next(site for site in main_sites(model) if on_the_grid(model, name, site, grid))
    model.set_graft({site.address: "neighborhood"})
    inputs = inputs_of(name)
    before = record(model, name, inputs, site.path)
    token = touch(name, inputs, grid) if name not in NORMALISED else touch_tokens(model, site, grid)
    after = record(model, name, inputs, site.path)
    tokens = frame_of(grid, before[0].shape[0])
    touched = changed(before[0], after[0])
    start = min(touched) - token
    assert touched == {start + token}, "the patch is not where the grid says"
    noticed = {index - start for index in changed(before[1], after[1]) if 0 <= index - start < tokens.tokens}
    assert token in noticed
    assert noticed == near(token, tokens)


def frame_of(grid, tokens):
    """Frames may be samples of their own."""
    return grid if tokens >= grid.tokens else dg.Grid(height=grid.height, width=grid.width)


def on_the_grid(model, name, site, grid):
    stream = record(model, name, inputs_of(name), site.path)[0]
    return stream.shape[0] >= grid.height * grid.width


PROMPTS = ("encoder_hidden_states", "text_bth", "cap_feats", "input_ids", "encoder_hidden_states_t5")
NO_TEXT_AMONG_IMAGES = {"HeliosTransformer3DModel": "what stands before the image is earlier frames"}


@pytest.mark.parametrize("mixer", [*MIXERS, "neighborhood"])
@pytest.mark.parametrize("name", [name for name in GRIDS if name not in NO_TEXT_AMONG_IMAGES])
def test_the_prompt_reaches_every_image_token(name, mixer):
    model = tiny(name)
    context = read_context(model, (), inputs_of(name))
    mixing = [site for site in main_sites(model) if on_the_grid(model, name, site, context.grid)]
    site = next((site for site in mixing if site.kind == "joint_attention"), mixing[-1])
    if site.kind == "self_attention" and context.text_first is None:
        return  # the prompt comes by cross-attention
    model.set_graft({site.address: MIXERS.get(mixer, mixer)})
    inputs = inputs_of(name)
    before = record(model, name, inputs, site.path)
    for prompt in PROMPTS:
        if prompt in inputs:
            parts = inputs[prompt] if isinstance(inputs[prompt], list) else [inputs[prompt]]
            changed_parts = [part.flip(-1) * (2 if part.is_floating_point() else 1) for part in parts]
            inputs[prompt] = changed_parts if isinstance(inputs[prompt], list) else changed_parts[0]
    after = record(model, name, inputs, site.path)
    unmoved = set(range(len(before[1]))) - changed(before[1], after[1])
    assert len(unmoved) == 0


STREAMS = {"ErnieImageTransformer2DModel", "Lumina2Transformer2DModel", "Krea2Transformer2DModel"}


@pytest.mark.parametrize("name", sorted(STREAMS & set(exported())))
def test_a_wrong_order_in_a_stream_would_be_noticed(name, monkeypatch):
    row = families.family_of(tiny(name))
    monkeypatch.setitem(families._rows_by_class(), exported()[name], replace(row, text_first=not row.text_first))
    site = dg.find_sites(tiny(name)).where(kind="self_attention")[-1]
    monkeypatch.setattr("tests.inspection.test_grids.main_sites", lambda model: [site])
    with pytest.raises(AssertionError):
        test_a_touched_patch_reaches_its_neighbours_alone(name)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel"])
def test_a_wrong_order_of_two_streams_would_be_noticed(name, monkeypatch):
    processor = tiny(name).transformer_blocks[0].attn.processor
    cls = grafted_class(type(processor))
    monkeypatch.setattr(cls, "_text_first", not cls._text_first)
    with pytest.raises(AssertionError):
        test_a_touched_patch_reaches_its_neighbours_alone(name)


@pytest.mark.parametrize("name", sorted(set(NO_GRID) & set(exported())))
def test_where_tokens_lie_on_no_grid_the_refusal_says_what_to_add(name):
    model = tiny(name)
    if name == "MiniMaxMusic3RVQDepthDecoder":
        return  # causal, and refused for that
    model.set_graft({main_sites(model)[0].address: "neighborhood"})
    with pytest.raises(GeometryError, match=r"add a row to diffusers_graft/inspection/families.py|cannot honour"):
        predict(model, name)


def test_the_tables_name_classes_that_exist():
    assert set(NO_GRID) | WAVEFORMS | set(ACROSS_FRAMES) <= set(ROWS)


def with_references(inputs, sides):
    """The inputs with the tokens of reference images behind those of the image."""
    tokens = sum(height * width for height, width in sides)
    latents = inputs["hidden_states"]
    generator = torch.Generator().manual_seed(1)
    references = torch.randn(len(latents), tokens, latents.shape[2], generator=generator)
    changes = {"hidden_states": torch.cat([latents, references], 1)}
    if "img_shapes" in inputs:
        more = [(1, height, width) for height, width in sides]
        return {**inputs, **changes, "img_shapes": [[*sample, *more] for sample in inputs["img_shapes"]]}
    ids = inputs["img_ids"]
    for number, (height, width) in enumerate(sides, start=1):
        grid = torch.cartesian_prod(torch.tensor([number]), torch.arange(height), torch.arange(width)).to(ids)
        grid = torch.nn.functional.pad(grid, (0, ids.shape[-1] - 3))
        ids = torch.cat([ids, grid.expand(*ids.shape[:-2], -1, -1)], -2)
    return {**inputs, **changes, "img_ids": ids}


REFERENCES = [
    ("FluxTransformer2DModel", "joint_attention[0]"),
    ("FluxTransformer2DModel", "self_attention[0]"),
    ("Flux2Transformer2DModel", "joint_attention[0]"),
    ("QwenImageTransformer2DModel", "joint_attention[0]"),
    ("LongCatImageTransformer2DModel", "joint_attention[0]"),
]


@pytest.mark.parametrize("mixer", ["neighborhood", "linear_attention"])
@pytest.mark.parametrize(("name", "site"), REFERENCES)
def test_reference_images_are_read_by_all_and_are_no_frames(name, site, mixer):
    if name not in exported():
        pytest.skip("a later version of diffusers has it")
    is_stream = site.startswith("self")  # which holds the prompt too, before the image
    # Blocks before it would mix what one token brings.
    model = tiny(name, **({"num_layers": 0} if is_stream else {}))
    inputs = inputs_of(name)
    grid = read_context(model, (), inputs).grid
    model.set_graft({site: mixer})
    path = model.graft.plan.edits[0].site.path
    for sides in ([(grid.height, grid.width)], [(2, 3), (grid.height, 5)]):
        edited = with_references(inputs, sides)
        assert read_context(model, (), edited).grid == grid
        before = record(model, name, edited, path)
        start = len(before[0]) - grid.tokens - sum(height * width for height, width in sides)
        start *= is_stream
        touched = {**edited, "hidden_states": edited["hidden_states"].clone()}
        token = PLACE[0] * grid.width + PLACE[1]
        touched["hidden_states"][:, token] += 1
        after = record(model, name, touched, path)
        assert changed(before[0], after[0]) == {start + token}
        noticed = {index - start for index in changed(before[1], after[1])}
        image = set(range(grid.tokens))
        assert noticed >= set(range(grid.tokens, len(before[0]) - start)), "references see the image"
        assert noticed & image == (near(token, grid) if mixer == "neighborhood" else image)
        touched["hidden_states"][:, grid.tokens :] += 1
        moved = record(model, name, touched, path)
        assert changed(after[1], moved[1]) >= {start + place for place in image}, "the image sees references"


IDEOGRAM = {
    "position_ids": torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)),
    "indicator": torch.full((2, 6), 2),
}


@pytest.mark.parametrize(
    ("reader", "inputs", "grid"),
    [
        ("read_grid", {"img_shapes": [[(1, 2, 3)], [[1, 2, 3]]]}, Grid(height=2, width=3)),
        ("read_grid", {"img_shapes": [[(1, 2, 3)], [(1, 3, 2)]]}, None),
        ("read_grid", {"img_shapes": []}, None),
        ("read_grid", {"hidden_states": torch.zeros(1, 1, 3, 4, 0)}, None),
        ("read_grid", {"hidden_states": torch.zeros(1, 1, 3)}, None),
        ("read_grid", {"img_shapes": [[(1, 2, 3), (1, 2, 3)]] * 2}, Grid(height=2, width=3)),
        ("read_grid", {"img_shapes": [(1, 2, 3)] * 2}, Grid(height=2, width=3)),
        ("read_grid", {"img_shapes": (1, 2, 3)}, Grid(height=2, width=3)),
        ("read_grid", {"img_shapes": [(1, 2, 3), (1, 3, 2)]}, None),
        ("read_grid", {"img_ids": torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 1]])}, None),
        ("read_grid", {"img_ids": torch.tensor([[0, 0, 0], [0, 0, 2]])}, None),
        ("from_last_shape", {"img_shapes": [[(1, 9, 9), (1, 2, 3)]]}, Grid(height=2, width=3)),
        ("from_last_shape", {"img_shapes": [[(1, 2, 3)], [(1, 3, 2)]]}, None),
        ("from_vision_shapes", {"vision_token_shapes": [(1, 2, 3)]}, Grid(height=2, width=3)),
        ("from_vision_shapes", {"vision_token_shapes": [(1, 2, 3)] * 2}, None),
        ("from_marked_positions", IDEOGRAM, Grid(height=2, width=3)),
        ("from_marked_positions", {**IDEOGRAM, "indicator": torch.arange(12).view(2, 6)}, None),
    ],
)
def test_a_grid_is_read_or_left_open(reader, inputs, grid):
    assert getattr(geometry, reader)(SimpleNamespace(config=None), inputs) == grid
