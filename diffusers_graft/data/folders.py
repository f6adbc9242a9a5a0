"""Pictures and prompts on disk, and data sets of the `datasets` library, as they are read for training."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..core.storage import open_regular, read_text
from ..errors import FileError, MissingDependencyError, TrainingError

METADATA = "metadata.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Names under which data sets hold a prompt or a caption.
_CAPTION_NAMES = ("text", "caption", "prompt")
_MOST_NAMED = 3


class PictureFolder(Dataset):
    """Pictures of a folder and the folders in it, each `{"image": picture, "text": caption}`, or with a `label`.

    Captions are in `a.txt` beside `a.png`, or in `metadata.jsonl` with a line `{"file_name": "a.png", "text": "..."}`
    a picture, as for `load_dataset("imagefolder")`. Where there are no captions at all and every picture lies in a
    folder of its class, the label is the number of that folder among all, by name.

    Raises `FileError`, when it is made, for a folder without pictures, pictures without captions, and captions of
    pictures that are not there.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileError(f"There is no folder {folder}. Give one with pictures.")
        found = (path for path in self.folder.rglob("*") if path.suffix.lower() in PICTURES)
        self.paths = sorted(path for path in found if not path.name.startswith("."))
        if not self.paths:
            raise FileError(f"There are no pictures in {folder}: it takes {', '.join(PICTURES)}.")
        self.labels: dict[Path, int] = {}
        self.captions = self._read_metadata() if (self.folder / METADATA).exists() else self._read_texts()
        if not self.captions:
            self.labels = self._number_classes()
        self._require_captions()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        sample: dict[str, Any] = {"image": _open_picture(path)}
        if self.labels:
            return {**sample, "label": self.labels[path]}
        return {**sample, "text": self.captions[path]}

    def _read_texts(self) -> dict[Path, str]:
        captions = {}
        for path in self.paths:
            beside = path.with_suffix(".txt")
            if beside.exists():
                captions[path] = " ".join(read_text(beside).split())
        return captions

    def _read_metadata(self) -> dict[Path, str]:
        captions = {}
        for number, row in enumerate(_read_rows(self.folder / METADATA), 1):
            path = self.folder / str(row.get("file_name", ""))
            if path not in self.paths:
                raise FileError(
                    f"Line {number} of {self.folder / METADATA} is of {row.get('file_name')!r}, and there is no such "
                    'picture: file_name is its path from that folder, as "a.png".'
                )
            captions[path] = find_caption(row)
        return captions

    def _number_classes(self) -> dict[Path, int]:
        names = sorted({path.parent.name for path in self.paths})
        if any(path.parent.parent != self.folder for path in self.paths):
            return {}
        return {path: names.index(path.parent.name) for path in self.paths}

    def _require_captions(self) -> None:
        if self.labels:
            return
        bare = [path.relative_to(self.folder).as_posix() for path in self.paths if not self.captions.get(path)]
        if bare:
            named = ", ".join(bare[:_MOST_NAMED])
            raise FileError(
                f"{len(bare)} of {len(self.paths)} pictures in {self.folder} have no caption ({named}): write each "
                f"into a .txt of the same name, or all of them into {METADATA}, or take those pictures out."
            )


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts: the lines of a text that are not empty, or the objects of a `.jsonl` with a `text` or `prompt`.

    Raises `FileError` for a file that is missing, or holds no prompt.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        prompts = [find_caption(row) for row in _read_rows(path)]
    else:
        prompts = [line.strip() for line in read_text(path).splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise FileError(f"{path} holds no prompts. Write one a line.")
    return prompts


def open_dataset(path: str, *, split: str = "train", streaming: bool = True, **arguments: Any) -> Any:
    """Open a data set of the Hub or of local files with `datasets.load_dataset`; by default it is streamed.

    Args:
        path, split, arguments: of `load_dataset`.

    Raises `MissingDependencyError` without `datasets`, and `FileError` where it opens no such data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("A data set of the Hub", "`datasets`", extra="data") from error
    try:
        return datasets.load_dataset(path, split=split, streaming=streaming, **arguments)
    except (OSError, ValueError, LookupError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise FileError(f"The data set {path} (split {split!r}) cannot be opened: {first_line}") from error


def open_shards(urls: str | Sequence[str]) -> Any:
    """Open WebDataset shards as a stream of samples, through `datasets`.

    Args:
        urls: paths or addresses of tar files; in one text, `{000..099}` stands for numbers, and `*` for anything.

    Raises `MissingDependencyError` without `datasets`, and `FileError` where there are no such shards.
    """
    given = [urls] if isinstance(urls, str) else list(urls)
    files = [file for url in given for file in _expand_numbers(url)]
    return open_dataset("webdataset", data_files={"train": files})


def find_caption(row: dict[str, Any]) -> str:
    """Return the caption or prompt of a row, empty where it has none."""
    return next((str(row[name]).strip() for name in _CAPTION_NAMES if row.get(name)), "")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line. Raises `FileError` for a line that is none."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileError(f"Line {number} of {path} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise FileError(f"Line {number} of {path} is no JSON object.")
        rows.append(row)
    return rows


def _open_picture(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("A folder of pictures", "pillow", extra="data") from error
    with open_regular(path) as file:
        try:
            picture = Image.open(file)
            # Read now: the file is closed when this returns.
            picture.load()
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise FileError(f"{path} is no picture ({error}). Take it out.") from error
    return picture


def _expand_numbers(url: str) -> list[str]:
    """Return what a text with `{000..099}` in it stands for."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if match is None:
        return [url]
    first, last = match.groups()
    if int(last) < int(first):
        raise TrainingError(f"{match[0]} counts down. Write {{{last}..{first}}}.")
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [shard for number in numbers for shard in _expand_numbers(url.replace(match[0], number, 1))]
