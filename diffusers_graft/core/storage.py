"""Plans and surveys as JSON files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import FileError


def write_json(path: str | Path, data: dict[str, Any], what: str) -> None:
    """In place of what is there, whole or not at all. Raises `FileError` for a path that cannot be written."""
    text, path = json.dumps(data, indent=2) + "\n", Path(path)
    fresh = path.parent / f".{path.name}.new"
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a path that there cannot be
            fresh.unlink()
        raise FileError(f"The {what} cannot be written to {path}: {error}.") from error


def read_json(path: str | Path, what: str) -> Any:
    """Raises `FileError` for a file that is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"There is no {what} at {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}") from error
