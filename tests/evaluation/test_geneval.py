"""GenEval: prompts as released, rules on constructed detections, and a scorer whose networks are tiny ones."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedTokenizerFast,
    SwinConfig,
    T5Config,
    T5EncoderModel,
)

import diffusers_graft as dg
from diffusers_graft.errors import FileError, GraftError
from diffusers_graft.evaluation import metrics
from diffusers_graft.evaluation.geneval.networks import ColourClassifier, Detector, cut_out
from diffusers_graft.evaluation.geneval.prompts import COLOURS, load_prompts
from diffusers_graft.evaluation.geneval.rules import Detection, judge, relations, select_objects
from diffusers_graft.evaluation.transformers_models import ClipModel, DinoModel

from ..models import tiny_pixart
from .pipelines import tiny_autoencoder

# Lines as `prompts/create_prompts.py` of GenEval writes them, one of each kind.
LINES = {
    "single_object": {"include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    "two_object": {
        "include": [{"class": "bench", "count": 1}, {"class": "tv remote", "count": 1}],
        "prompt": "a photo of a bench and a tv remote",
    },
    "counting": {
        "include": [{"class": "bench", "count": 2}],
        "exclude": [{"class": "bench", "count": 3}],
        "prompt": "a photo of two benchs",
    },
    "colors": {"include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a photo of a red bench"},
    "position": {
        "include": [{"class": "bench", "count": 1}, {"class": "cow", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cow left of a bench",
    },
    "color_attr": {
        "include": [{"class": "bench", "count": 1, "color": "red"}, {"class": "cow", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red bench and a blue cow",
    },
}
LINES = {tag: {"tag": tag, **line} for tag, line in LINES.items()}


def seen(label, score=0.95, box=(0, 0, 10, 10)):
    return Detection(label, box, score)


def fault_of(tag, *detections, colours=None):
    """What is wrong with a picture in which these were found, whose classes have these colours."""
    return judge(
        LINES[tag],
        select_objects(detections, tag),
        lambda label, found: [(colours or {})[label]] * len(found),
    )


LEFT, RIGHT, NEAR = (0, 0, 10, 10), (50, 0, 60, 10), (11, 0, 21, 10)


@pytest.mark.parametrize(
    ("tag", "detections", "colours", "words"),
    [
        ("single_object", [seen("bench")], None, ""),
        ("single_object", [seen("bench", 0.31)], None, ""),
        ("single_object", [seen("bench", 0.3)], None, "1 bench are asked for, and 0 there"),
        ("single_object", [seen("cow")], None, "0 there"),
        ("single_object", [seen("bench")] * 3 + [seen("cow")], None, ""),  # more than asked for is no fault
        ("two_object", [seen("bench"), seen("tv remote")], None, ""),
        ("two_object", [seen("bench"), seen("bench")], None, "1 tv remote"),
        ("counting", [seen("bench")] * 2, None, ""),
        ("counting", [seen("bench"), seen("bench", 0.89)], None, "2 bench are asked for, and 1 there"),
        ("counting", [seen("bench")] * 3, None, "fewer than 3 bench"),
        ("counting", [seen("bench")] * 2 + [seen("bench", 0.5)], None, ""),  # unsure ones are not counted
        ("colors", [seen("bench")], {"bench": "red"}, ""),
        ("colors", [seen("bench")], {"bench": "blue"}, "bench is to be red, and is blue"),
        ("position", [seen("bench", box=RIGHT), seen("cow", box=LEFT)], None, ""),
        ("position", [seen("bench", box=LEFT), seen("cow", box=RIGHT)], None, "cow is not left of bench"),
        ("position", [seen("bench", box=NEAR), seen("cow", box=NEAR)], None, "not left of"),
        ("position", [seen("cow", box=LEFT)], None, "1 bench"),
        # Of several the most confident one counts, wherever the others are.
        (
            "position",
            [seen("bench", box=RIGHT), seen("cow", 0.8, LEFT), seen("cow", 0.9, (80, 0, 90, 10))],
            None,
            "not left",
        ),
        ("color_attr", [seen("bench"), seen("cow")], {"bench": "red", "cow": "blue"}, ""),
        ("color_attr", [seen("bench"), seen("cow")], {"bench": "blue", "cow": "red"}, "bench is to be red"),
    ],
)
def test_the_rules(tag, detections, colours, words):
    fault = fault_of(tag, *detections, colours=colours)
    assert words in fault
    assert bool(fault) == bool(words)


def test_sixteen_objects_of_a_class_are_looked_at():
    objects = select_objects([seen("bench", 0.5 + 0.01 * number) for number in range(20)], "single_object")
    assert [round(one.score, 2) for one in objects["bench"]] == [
        round(0.69 - 0.01 * number, 2) for number in range(16)
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}),
        ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (50, 50, 60, 60), {"left of", "above"}),
        ((0, 0, 10, 10), (1, 1, 11, 11), set()),
    ],
)
def test_positions_of_boxes(first, second, expected):
    assert relations(first, second) == expected


def test_released_prompts_are_read(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES.values()))
    assert load_prompts(path) == list(LINES.values())


def test_prompts_that_are_missing_are_named_with_their_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="djghosh13/geneval"):
        load_prompts()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        ('{"prompt": "a", "include": []}', '"tag"'),
        ('{"tag": "colors", "include": [{"class": "bench", "count": 1}]}', '"prompt"'),
        ('{"tag": "colors", "prompt": "a"}', '"include"'),
        ('{"tag": "colors", "prompt": "a", "include": [{"class": "bench"}]}', '"count" from 1'),
        ('{"tag": "colors", "prompt": "a", "include": [{"count": 1}]}', '"class"'),
        ('{"tag": "c", "prompt": "a", "include": [{"class": "b", "count": 1, "color": "teal"}]}', "teal"),
        (
            '{"tag": "p", "prompt": "a", "include": [{"class": "b", "count": 1, "position": ["above", 0]}]}',
            "earlier object",
        ),
    ],
)
def test_prompts_with_missing_fields_are_refused_with_their_line(line, words, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(LINES["colors"]) + "\n" + line)
    with pytest.raises(FileError, match="Line 2") as error:
        load_prompts(path)
    assert words in str(error.value)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of the words that these prompts have."""
    texts = " ".join([*COLOURS, "a photo of colored - object bench cow tv remote and left"]).split()
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "</s>", *dict.fromkeys(texts)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=16
    )


@pytest.fixture(scope="module")
def clip_folder(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**layers, "image_size": 16, "patch_size": 8}
    text = {**layers, "vocab_size": len(words), "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        num_queries=6,
        id2label={0: "bench", 1: "cow", 2: "remote"},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return Detector(str(folder))


@pytest.fixture(scope="module")
def text_pipeline(words):
    torch.manual_seed(0)
    encoder = T5Config(vocab_size=len(words), d_model=10, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return PixArtAlphaPipeline(
        tokenizer=words,
        text_encoder=T5EncoderModel(encoder).eval(),
        vae=tiny_autoencoder(),
        transformer=tiny_pixart(num_layers=1),
        scheduler=DDIMScheduler(),
    )


SAMPLING = dg.Sampling(
    steps=1,
    guidance=2.0,
    height=16,
    width=16,
    samples_per_condition=2,
    arguments={"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16},
)


def test_prompts_are_drawn_and_scored_end_to_end(text_pipeline, detector, clip_folder, tmp_path, monkeypatch):
    """Pictures lie as GenEval's own scorer reads them, and those of another program are scored from there."""
    clip = ClipModel(str(clip_folder))
    metric = metrics.GenEval(detector=detector, clip=clip)
    chosen = [metric, metrics.CLIPScore(clip=clip)]
    prompts = list(LINES.values())
    folder = tmp_path / "images"
    scores = dg.evaluate(text_pipeline, prompts, sampling=SAMPLING, metrics=chosen, output=folder)
    assert {"geneval", *(f"geneval_{tag}" for tag in LINES)} <= scores.values.keys()
    assert 0 <= scores["clip_score"] <= 100
    assert scores.protocol["samples"] == 12
    assert scores.protocol["GenEval.detector"].startswith("Detector ")
    for number, line in enumerate(prompts):
        assert json.loads((folder / f"{number:05d}" / "metadata.jsonl").read_text()) == line
        names = sorted(path.name for path in (folder / f"{number:05d}" / "samples").iterdir())
        assert names == ["0000.png", "0001.png"]
    again = metrics.score_geneval_folder(folder, metric)
    assert again == {name: value for name, value in scores.values.items() if name.startswith("geneval")}
    # With a detector that sees what it should, all but the colours are right.
    monkeypatch.setattr(
        Detector, "detect", lambda self, pictures: [[seen("bench", box=(8, 0, 16, 8)), seen("cow", box=(0, 0, 4, 8))]]
    )
    seen_scores = metrics.score_geneval_folder(folder, metric)
    assert seen_scores["geneval_single_object"] == seen_scores["geneval_position"] == 1
    assert seen_scores["geneval_two_object"] == seen_scores["geneval_counting"] == 0


def test_objects_are_found_with_their_masks(detector, monkeypatch):
    pictures = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("diffusers_graft.evaluation.geneval.networks._LEAST_SCORE", 0.0)
    found = detector.detect(pictures)
    assert len(found) == 2
    assert found[0]
    for one in found[0]:
        left, top, right, bottom = one.box
        assert one.label in ("bench", "cow", "tv remote")
        assert one.mask.shape == (24, 40)
        assert one.mask[top:bottom, left:right].any(0)[[0, -1]].all()
        assert one.mask.sum() == one.mask[top:bottom, left:right].sum()


def test_what_is_not_the_object_is_grey():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2:5] = True
    mask[1, 2] = False
    part = cut_out(torch.ones(3, 4, 6), Detection("bench", (2, 1, 5, 3), 0.9, mask))
    assert part.shape == (3, 2, 3)
    assert part[0].tolist() == [[pytest.approx(0.6), 1, 1], [1, 1, 1]]


def test_colours_are_those_whose_phrases_are_nearest(clip_folder):
    clip = ClipModel(str(clip_folder))
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    (named,) = ColourClassifier(clip).classify(picture, "bench", [Detection("bench", (0, 0, 16, 16), 0.9)])
    image = clip.embed_images(picture[None])
    best = []
    for colour in COLOURS:
        texts = [
            f"a photo of a {colour} bench",
            f"a photo of a {colour}-colored bench",
            f"a photo of a {colour} object",
        ]
        mean = clip.embed_texts(texts).mean(0)
        best.append((image @ mean / mean.norm()).item())
    assert named == COLOURS[best.index(max(best))]


def test_embeddings_are_those_of_transformers(clip_folder, tmp_path):
    images = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    clip = ClipModel(str(clip_folder))
    pixels = clip.prepare(images)
    output = clip.model(pixel_values=pixels, **clip.tokenizer(["a red bench"], return_tensors="pt"))
    assert torch.allclose(clip.embed_images(images), output.image_embeds, atol=1e-6)
    assert torch.allclose(clip.embed_texts(["a red bench"]), output.text_embeds, atol=1e-6)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessorPil().save_pretrained(tmp_path)
    dino = DinoModel(str(tmp_path))
    assert dino.prepare(images).shape == (2, 3, 224, 224)
    assert dino(images).shape == (2, 16)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (metrics.GenEval(), "mask2former-swin-small-coco-instance"),
        (metrics.CLIPScore(), "clip-vit-large-patch14,"),
        (metrics.CMMD(reference="none.npz"), "clip-vit-large-patch14-336"),
        (metrics.FDDINOv2(reference="none.npz"), "dinov2-large"),
    ],
)
def test_weights_that_are_not_there_are_named(metric, words):
    with pytest.raises(FileError, match=words) as error:
        metric.open_extractor() if hasattr(metric, "open_extractor") else metric.check([LINES["colors"]])
    assert "hf download" in str(error.value)


def test_conditions_that_are_no_prompts_of_geneval(detector, clip_folder):
    metric = metrics.GenEval(detector=detector, clip=ClipModel(str(clip_folder)))
    with pytest.raises(GraftError, match="takes prompts of load_prompts"):
        metric.check(["a photo of a bench"])
    unknown = {**LINES["single_object"], "include": [{"class": "unicorn", "count": 1}]}
    with pytest.raises(GraftError, match="knows no unicorn"):
        metric.check([unknown])


def test_folders_without_pictures_of_geneval(tmp_path):
    with pytest.raises(FileError, match=r"00000/metadata.jsonl"):
        metrics.score_geneval_folder(tmp_path)
