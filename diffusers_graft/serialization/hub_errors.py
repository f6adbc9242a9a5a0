"""Errors of the Hub in our words: which repository, what the Hub answered, what to do; never a token."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import FileError, GraftError

HUB_ERRORS = (HfHubHTTPError, HFValidationError, EntryNotFoundError, OfflineModeIsEnabled, HTTPError, OSError)
# Raised by the client over answers that are not the Hub's, metadata that it refuses, and parts that fail.
_CLIENT_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RuntimeError)

CHANGED_MEANWHILE = 412

_TOKEN = "Log in with `hf auth login`, or pass token=..."
_REASONS = {
    400: "the request was not understood",
    401: f"it is private, or your token is not valid. {_TOKEN}",
    403: f"your token has no right to do this. {_TOKEN} of an account, or with a scope, that has.",
    404: "there is nothing at that address. Check the name.",
    407: "a proxy asks for a login first.",
    409: "it exists already, or was changed meanwhile. Try again.",
    CHANGED_MEANWHILE: "it was changed meanwhile, again and again. Nothing of it was overwritten. Try again.",
    413: "a file is too large for the Hub. Save it in smaller shards (max_shard_size).",
    416: "the file changed while it was downloaded. Try again.",
    429: "too many requests were made. Wait some minutes and try again.",
}
_SECRET = re.compile(r"(hf_|api_org_)[A-Za-z0-9]{10,}|Bearer\s+\S+")


@contextlib.contextmanager
def explain_hub_errors(repo_id: str | None, revision: str | None = None) -> Iterator[None]:
    """Raise `FileError` in place of every error of the Hub or of its client inside the block.

    Args:
        repo_id: the repository that is asked for, None where the whole Hub is searched.
    """
    try:
        yield
    except GraftError:
        raise
    except (*HUB_ERRORS, *_CLIENT_ERRORS) as error:
        # an error that shows a token must not be shown as the cause either
        cause = None if _shows_secret(error) else error
        raise explain(error, repo_id, revision) from cause


def explain(error: Exception, repo_id: str | None, revision: str | None = None) -> FileError:
    """Return an error of the Hub as one of ours."""
    what = "The Hub" if repo_id is None else f"The Hub repository {repo_id}"
    return FileError(_without_secrets(f"{what} {_reason(error, revision)}"))


def clean_token(token: Any) -> Any:
    """Return a token without the line break of the file that it was read from.

    Raises `FileError` for a token with characters that no token has, which the message does not show.
    """
    if not isinstance(token, str):
        return token
    token = token.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise FileError(
            "The token holds a space, a line break or another character that no token has. "
            "Copy it again from the settings of your account."
        )
    return token


def status_code(error: Exception) -> int | None:
    """Return the HTTP status of an error, None where no answer came."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException, revision: str | None) -> str:
    """Return in words why the Hub did not do what it was asked, and what to do."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HTTPError):
        error = error.__cause__  # the client searched its cache after the Hub had refused
    if isinstance(error, GatedRepoError):
        return f"is gated: ask for access on its page first. {_TOKEN}"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}. Give a branch, a tag or a commit that it has."
    if isinstance(error, LocalEntryNotFoundError):
        remedy = "unset HF_HUB_OFFLINE" if is_offline_mode() else "drop local_files_only, or check the network"
        return f"is not in the local cache, and the Hub cannot be asked: {remedy}."
    if isinstance(error, RepositoryNotFoundError):
        return f"does not exist, or is private to others ({status_code(error)}). Check the name. {_TOKEN}"
    if isinstance(error, EntryNotFoundError):
        return f"lacks a file: {_first_line(error)}"
    if isinstance(error, HFValidationError):
        return f"cannot exist: {_first_line(error)}"
    code = status_code(error) if isinstance(error, Exception) else None
    if code is not None:
        other = "the Hub itself failed. Try again later." if code >= 500 else "it was refused."
        return f"could not be used (HTTP {code}): {_REASONS.get(code, other)}"
    if isinstance(error, HUB_ERRORS):
        return f"could not be reached: {_first_line(error)}"
    return _client_reason(error, revision)


def _client_reason(error: BaseException, revision: str | None) -> str:
    """Return in words an error that the Hub's client raised over an answer."""
    text = str(error)
    if text.startswith("Invalid metadata in README.md"):
        entries = " ".join(text.splitlines()[1:])
        return f"refuses the metadata of the card: {entries} Change these entries at the head of README.md."
    # a part of an upload that failed, with the reason as its cause
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return f"{_reason(error.__cause__, revision)} ({_first_line(error)})"
    if isinstance(error, JSONDecodeError | LookupError | TypeError | AttributeError):
        return (
            "could not be used: the answer is not the Hub's. A proxy or a login page may answer in its place: "
            "open the Hub in a browser, and check HF_ENDPOINT."
        )
    return f"could not be used: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _without_secrets(text: str) -> str:
    return _SECRET.sub("(a token)", text)


def _shows_secret(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, shows a token."""
    while error is not None:
        if _SECRET.search(f"{error} {error.args}"):
            return True
        error = error.__cause__ or error.__context__
    return False
