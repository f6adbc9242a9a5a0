"""Progress bars: on a terminal and in notebooks with widgets, and nowhere else."""

from __future__ import annotations

import importlib.util
import sys


def hide_bar(progress: bool) -> bool | None:
    """Return what tqdm takes as `disable`: True for no bar, False for one, None where the terminal decides.

    Args:
        progress: whether a bar is wanted at all.
    """
    if not progress:
        return True
    # a notebook is no terminal; without widgets it would keep every state of a bar as a line of its own
    if "ipykernel.zmqshell" in sys.modules and importlib.util.find_spec("ipywidgets") is not None:
        return False
    return None
