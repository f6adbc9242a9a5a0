"""Pictures, prompts and shards as people have them on disk."""

import io
import json
import tarfile

import pytest
from PIL import Image

import diffusers_graft as dg
from diffusers_graft.errors import FileError, TrainingError


def draw(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (shade, 0, 0)).save(path)


def rows_of(folder):
    return [(sample["image"].getpixel((0, 0))[0], sample["text"]) for sample in dg.data.PictureFolder(folder)]


def test_captions_lie_beside_pictures_or_in_metadata_as_for_imagefolder(tmp_path):
    for number in range(3):
        draw(tmp_path / "beside" / f"{number}.png", 50 * number)
        (tmp_path / "beside" / f"{number}.txt").write_text(f"number {number}\n")
        draw(tmp_path / "listed" / "inner" / f"{number}.png", 50 * number)
    lines = [{"file_name": f"inner/{number}.png", "text": f"number {number}"} for number in (2, 0, 1)]
    (tmp_path / "listed" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = [(0, "number 0"), (50, "number 1"), (100, "number 2")]
    assert rows_of(tmp_path / "beside") == expected
    assert rows_of(tmp_path / "listed") == expected
    theirs = dg.data.open_dataset("imagefolder", data_dir=str(tmp_path / "listed"))
    assert sorted((row["image"].getpixel((0, 0))[0], row["text"]) for row in theirs) == expected


def test_folders_of_classes_give_labels(tmp_path):
    for number, name in enumerate(["cat", "ant", "bee"]):
        draw(tmp_path / name / "a.png", number)
    found = [(sample["image"].getpixel((0, 0))[0], sample["label"]) for sample in dg.data.PictureFolder(tmp_path)]
    assert found == [(1, 0), (2, 1), (0, 2)]


def test_what_is_missing_is_named_when_the_folder_is_opened(tmp_path):
    with pytest.raises(FileError, match="no folder"):
        dg.data.PictureFolder(tmp_path / "nowhere")
    with pytest.raises(FileError, match="There are no pictures in"):
        dg.data.PictureFolder(tmp_path)
    for name in "abcd":
        draw(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(FileError, match=r"3 of 4 pictures in .* have no caption \(a.png, c.png, d.png\)"):
        dg.data.PictureFolder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "e.png", "text": "e"}')
    with pytest.raises(FileError, match="Line 1 of .* is of 'e.png', and there is no such picture"):
        dg.data.PictureFolder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name"')
    with pytest.raises(FileError, match="Line 1 of .* is not JSON"):
        dg.data.PictureFolder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    for name in "acd":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "c.png").write_bytes(b"half a picture")
    with pytest.raises(FileError, match="c.png is no picture"):
        dg.data.PictureFolder(tmp_path)[2]


def test_prompts_are_lines_or_rows(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n")
    assert dg.data.read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"text": "a dog", "tag": 1}\n')
    assert dg.data.read_prompts(tmp_path / "prompts.jsonl") == ["a cat", "a dog"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(FileError, match="empty.txt holds no prompts. Write one a line"):
        dg.data.read_prompts(tmp_path / "empty.txt")


def test_webdataset_shards_are_streams_of_pictures_and_captions(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:03d}.tar", "w") as tar:
            for number in range(3):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (100 * shard + number, 0, 0)).save(picture, format="PNG")
                for ending, content in (("png", picture.getvalue()), ("txt", f"{shard} {number}".encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    stream = dg.data.open_shards(str(tmp_path / "{000..001}.tar"))
    assert stream.num_shards == 2
    found = [(row["png"].getpixel((0, 0))[0], row["txt"]) for row in stream]
    assert found == [(100 * shard + number, f"{shard} {number}") for shard in range(2) for number in range(3)]
    with pytest.raises(FileError, match="cannot be opened"):
        dg.data.open_shards(str(tmp_path / "{005..006}.tar"))
    with pytest.raises(TrainingError, match=r"Write \{005..006\}"):
        dg.data.open_shards("{006..005}.tar")
