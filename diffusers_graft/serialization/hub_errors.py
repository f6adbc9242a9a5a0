"""What the Hub answers when it does not give what was asked, in words."""

from __future__ import annotations

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

from ..errors import FileError

HUB_ERRORS = (HfHubHTTPError, HFValidationError, EntryNotFoundError, OfflineModeIsEnabled, HTTPError, OSError)

_TOKEN = "Log in with `hf auth login`, or pass token=..."
_STATUS = {
    400: "the request was not understood",
    401: f"it is private, or your token is not valid. {_TOKEN}",
    403: f"your token has no right to do this. {_TOKEN} of an account, or with a scope, that has.",
    404: "there is nothing at that address. Look at the name.",
    409: "it exists already, or was changed meanwhile. Try again.",
    416: "the file changed while it was downloaded. Try again.",
    429: "too many requests were made. Wait some minutes and try again.",
}


def explain(error: Exception, repo_id: str, revision: str | None = None) -> FileError:
    """The error as one of ours: which repository, what the Hub said, what to do."""
    return FileError(f"The Hub repository {repo_id} {_reason(error, revision)}")


def _reason(error: Exception, revision: str | None) -> str:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HTTPError):
        error = error.__cause__  # the client looked into its cache after the Hub had refused
    if isinstance(error, GatedRepoError):
        return f"is gated: ask for access on its page first. {_TOKEN}"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}. Give a branch, a tag or a commit that it has."
    if isinstance(error, LocalEntryNotFoundError):
        remedy = "unset HF_HUB_OFFLINE" if is_offline_mode() else "drop local_files_only, or look at the network"
        return f"is not in the local cache, and the Hub cannot be asked: {remedy}."
    if isinstance(error, RepositoryNotFoundError):
        return f"does not exist, or is private to others ({_code(error)}). Look at the name. {_TOKEN}"
    if isinstance(error, EntryNotFoundError):
        return f"lacks a file: {_first_line(error)}"
    if isinstance(error, HFValidationError):
        return f"cannot exist: {_first_line(error)}"
    code = _code(error)
    if code is not None:
        server = "the Hub itself failed. Try again later." if code >= 500 else "it was refused."
        return f"could not be used (HTTP {code}): {_STATUS.get(code, server)}"
    return f"could not be reached: {_first_line(error)}"


def _code(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
