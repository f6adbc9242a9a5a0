"""Pictures of the original and of the graft from the same seeds: written by a run, paired for its report."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.storage import read_bytes, read_text, replace_file, write_text
from ..errors import FileError, MissingDependencyError
from .run_folder import SAMPLE_GRID, SAMPLES, RunFolder, explained

if TYPE_CHECKING:
    from PIL.Image import Image

ORIGINAL = "original"
GRAFTED = "graft"
DESCRIPTION = "samples.json"

_MOST_PAIRS = 12
# Longer sides are shown smaller: a report is one file that is sent around.
_LARGEST_SIDE = 384
# A smaller picture is shown with visible pixels.
_SMALL_SIDE = 96
_LARGEST_FILE = 2**28
# Of the difference map, a blue that is seen on light and on dark pages.
_DIFFERENCE_COLOUR = (42, 120, 214)


def save_samples(
    folder: str | Path,
    step: int,
    original: Iterable[Any],
    graft: Iterable[Any],
    *,
    conditions: Sequence[Any] = (),
    seeds: Sequence[int] = (),
    stage: str = "two",
) -> Path:
    """Write pictures of the original and of the graft, from the same seeds, for `dg.report`.

    Args:
        folder: output folder of the run.
        step: of the training, which names the folder `samples/step_000500`.
        original, graft: pictures of Pillow, or tensors [C, H, W] in [-1, 1], as many of each.
        conditions: prompt or label of each picture.
        seeds: of each picture.
        stage: of the training.

    Returns the folder of the pictures. Raises `FileError` where it cannot be written, and `MissingDependencyError`
    without Pillow.
    """
    root = Path(folder) / SAMPLES
    target = root / f"step_{step:06d}"
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"Samples cannot be written to {target}: {error}.") from error
    pairs = zip(original, graft, strict=True)
    for number, pair in enumerate(pairs):
        for name, picture in zip((ORIGINAL, GRAFTED), pair, strict=True):
            with replace_file(target / f"{name}_{number:03d}.png") as temporary:
                _to_picture(picture).save(temporary, format="png")
    row = {"stage": stage, "step": step, "folder": target.name, "conditions": list(conditions), "seeds": list(seeds)}
    rows = [other for other in _read_rows(root) if other.get("folder") != target.name]
    with replace_file(root / DESCRIPTION) as temporary:
        write_text(temporary, json.dumps([*rows, row], default=str, indent=1))
    return target


def describe_samples(run: RunFolder) -> dict[str, Any] | None:
    """Return the pairs of pictures of the last step, or one grid of them; None without pictures."""
    root = run.find(SAMPLES)
    folders: list[Path] = []
    if root is not None:
        # names have leading zeros, so their order is that of the steps
        folders = sorted(path for path in root.glob("step_*") if path.is_dir())
    if not folders:
        return _sample_grid(run)
    pictures = sorted(folders[-1].glob(f"{ORIGINAL}_*.png"))
    pairs = [(path, path.with_name(path.name.replace(ORIGINAL, GRAFTED, 1))) for path in pictures]
    pairs = [pair for pair in pairs if pair[1].exists()]
    if not pairs:
        return None
    shown = [_read_pair(*pair) for pair in pairs[:_MOST_PAIRS]]
    # one scale for all, so that pairs compare
    largest = max(difference.max().item() for _, _, difference in shown)
    captions = _captions(run, folders[-1])
    rows = []
    # pictures without words are shown, too
    captions += [""] * len(shown)
    for (original, graft, difference), caption in zip(shown, captions, strict=False):
        row = {
            "caption": caption,
            "difference": f"{difference.mean().item():.1%}",
            "is_small": max(original.size) < _SMALL_SIDE,
            "pictures": [
                ("original", _to_data(original)),
                ("graft", _to_data(graft)),
                ("difference", _to_data(_difference_map(difference, largest))),
            ],
        }
        rows.append(row)
    return {
        "rows": rows,
        "count": len(pairs),
        "step": int(folders[-1].name.removeprefix("step_")),
        "largest": f"{largest:.0%}",
    }


def _sample_grid(run: RunFolder) -> dict[str, Any] | None:
    path = run.find(SAMPLE_GRID)
    if path is None:
        return None
    return {"grid": _to_data(_open_picture(path), largest_side=1200)}


def _captions(run: RunFolder, folder: Path) -> list[str]:
    """Return the prompt or label and the seed of every pair of a step, as far as they are known."""
    with explained(run, f"{SAMPLES}/{DESCRIPTION}"):
        rows = [row for row in _read_rows(folder.parent) if row["folder"] == folder.name]
        if not rows:
            return []
        conditions = rows[-1].get("conditions") or []
        seeds = rows[-1].get("seeds") or []
        captions = []
        for condition, seed in itertools.zip_longest(conditions, seeds):
            words = []
            if condition is not None:
                words.append(str(condition))
            if seed is not None:
                words.append(f"seed {seed}")
            captions.append(" · ".join(words))
        return captions


def _read_rows(root: Path) -> list[dict[str, Any]]:
    """Return the rows of `samples.json`, a row a step. Raises `FileError` for a file that holds something else."""
    path = root / DESCRIPTION
    if not path.exists():
        return []
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: {error}. Remove it; pictures need no words.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "folder" in row for row in rows):
        raise FileError(f"{path} is not what a run writes: a list with an entry for every step. Remove it.")
    return rows


def _read_pair(first: Path, second: Path) -> tuple[Image, Image, torch.Tensor]:
    """Return two pictures and their difference, [H, W] in shares of the range, mean over the channels.

    Raises `FileError` for pictures that cannot be read, or of two sizes.
    """
    original = _open_picture(first)
    graft = _open_picture(second)
    if original.size != graft.size:
        raise FileError(f"{first.name} and {second.name} in {first.parent} differ in size: draw both anew.")
    difference = (_to_tensor(original) - _to_tensor(graft)).abs().mean(-1) / 255
    return original, graft, difference


def _open_picture(path: Path) -> Image:
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(read_bytes(path, limit=_LARGEST_FILE))) as picture:
            return picture.convert("RGB")
    # what Pillow raises for a damaged picture, or for one that is too large to be true
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise FileError(f"{path} is no picture that can be read: {error}. Remove it, or draw it anew.") from error


def _to_tensor(picture: Image) -> torch.Tensor:
    """Return a picture as a tensor [H, W, 3], 0 to 255."""
    width, height = picture.size
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(height, width, 3).float()


def _difference_map(difference: torch.Tensor, largest: float) -> Image:
    """Return a picture in one colour, the fuller the larger the difference, clear where there is none."""
    opacity = (255 * difference / max(largest, 1e-9)).round().to(torch.uint8)
    height, width = difference.shape
    colour = torch.tensor(_DIFFERENCE_COLOUR, dtype=torch.uint8).expand(height, width, 3)
    values = torch.cat([colour, opacity[..., None]], dim=-1)
    return _pillow().frombytes("RGBA", (width, height), bytes(values.flatten().tolist()))


def _to_data(picture: Image, *, largest_side: int = _LARGEST_SIDE) -> str:
    """Return a picture as the address of itself, smaller where it is large."""
    if max(picture.size) > largest_side:
        share = largest_side / max(picture.size)
        picture = picture.resize((math.ceil(picture.width * share), math.ceil(picture.height * share)))
    file = io.BytesIO()
    picture.save(file, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _to_picture(picture: Any) -> Image:
    """Return a tensor [C, H, W] in [-1, 1] as a picture of Pillow; other pictures as they are."""
    if not isinstance(picture, torch.Tensor):
        return picture
    # a grey picture has one channel, which stands for three
    values = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(3, -1, -1)
    height, width = values.shape[1:]
    return _pillow().frombytes("RGB", (width, height), bytes(values.permute(1, 2, 0).flatten().tolist()))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("Reading and writing pictures", "pillow", extra="eval") from error
    return Image
