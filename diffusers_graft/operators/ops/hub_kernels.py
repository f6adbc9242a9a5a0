"""Kernels from the Hub, built for many devices and versions of torch, through Hugging Face's library `kernels`."""

from __future__ import annotations

import functools
import re
from types import ModuleType

from ...errors import MissingDependencyError, OperatorError


@functools.cache
def load_hub_kernel(repo_id: str, *, revision: str, trust_remote_code: bool = False) -> ModuleType:
    """Return a kernel of the Hub as a module, always the same one: it is pinned to a commit.

    An operator calls it in the `run` of one of its backends, so that nothing is downloaded before that is asked for.

    Args:
        repo_id: the repository, such as `kernels-community/flash-attn2`.
        revision: the full id of a commit, since a branch or a version may come to mean other code.
        trust_remote_code: allow repositories of others than the publishers that `kernels` trusts.

    Raises `OperatorError` for a kernel that is not pinned, and for one that `kernels` refuses or that has no build for
    this machine; `MissingDependencyError` without `kernels`.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", str(revision)):
        raise OperatorError(
            f"The kernel {repo_id} is code that runs here: pin it with revision=, the full id of a commit; "
            f"got {revision!r}."
        )
    try:
        from kernels import get_kernel  # pyright: ignore[reportAttributeAccessIssue]  # taken for our own folder
    except ImportError as error:
        raise MissingDependencyError(f"The kernel {repo_id}", "kernels", extra="hub-kernels") from error
    try:
        return get_kernel(repo_id, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # of the Hub, of a publisher that is not trusted, of a build that is not there
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OperatorError(f"The kernel {repo_id} at {revision} cannot be loaded: {reason}") from error
