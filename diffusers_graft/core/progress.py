"""Progress bars: on a terminal and in notebooks, and nowhere else."""

from __future__ import annotations

import sys


def hide_bar(progress: bool) -> bool | None:
    """Return what tqdm takes as `disable`: True for no bar, False in a notebook, None where the terminal decides.

    Args:
        progress: whether a bar is wanted at all.
    """
    if not progress:
        return True
    # what a notebook shows is no terminal, and still a place for a bar
    if "ipykernel.zmqshell" in sys.modules:
        return False
    return None
