"""Plans and surveys as JSON files."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import FileError


def write_json(path: str | Path, data: dict[str, Any], what: str) -> None:
    """Raises `FileError` for a path that cannot be written."""
    try:
        Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise FileError(f"The {what} cannot be written to {path}: {error}.") from error


def read_json(path: str | Path, what: str) -> Any:
    """Raises `FileError` for a file that is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"There is no {what} at {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}") from error
