"""Pushes of a graft to the Hub while it is trained, in the background."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from .errors import GraftError
from .serialization.graft_folder import save_graft
from .serialization.upload import push_graft
from .training.callbacks import RunState
from .training.distributed import is_main_process
from .training.metrics_log import copy_metrics
from .training.previews import Preview

logger = logging.getLogger(__name__)

# Beside the checkpoints, which a push leaves out, too.
SNAPSHOT = ".push"


class BackgroundPush(Preview):
    """Push of the graft as it stands after every checkpoint; a network that is down ends no training.

    It is a callback as well, which is told of checkpoints. While a push is under way the next ones are left out.

    Args:
        folder: output folder of the run.
        repo_id: repository of the Hub.
        hub_arguments: see `diffusers_graft.serialization.upload.push_graft`.
    """

    def __init__(self, folder: str | Path, repo_id: str, **hub_arguments: Any):
        self.folder = Path(folder)
        self.repo_id = repo_id
        self.hub_arguments = hub_arguments
        self._is_due = False
        self._thread: threading.Thread | None = None

    def on_save(self, args: Any, state: RunState, control: Any, **given: Any) -> None:
        """Ask for a push."""
        self._is_due = True

    def is_due(self, state: RunState) -> bool:
        return self._is_due

    def show(self, model: ModelMixin, state: RunState, trackers: Sequence[Any]) -> None:
        self._is_due = False
        if not is_main_process():
            return
        if self._thread is not None and self._thread.is_alive():
            logger.info("The last push to %s is still under way; this one is left out.", self.repo_id)
            return
        snapshot = self.folder / SNAPSHOT
        try:
            # A folder of its own: what is uploaded must not change under the upload.
            shutil.rmtree(snapshot, ignore_errors=True)
            copy_metrics(self.folder, snapshot)
            save_graft(model, snapshot)
        except GraftError as error:
            logger.warning("The graft could not be saved for a push, training goes on: %s", error)
            return
        message = f"In training: stage {state.stage}, step {state.global_step} of {state.max_steps}"
        self._thread = threading.Thread(target=self._push, args=(snapshot, message), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the push that is under way, and ask for no other one."""
        self._is_due = False
        if self._thread is not None:
            self._thread.join()

    def _push(self, snapshot: Path, message: str) -> None:
        try:
            push_graft(snapshot, self.repo_id, commit_message=message, **self.hub_arguments)
        except (GraftError, OSError) as error:
            logger.warning("The graft was not pushed to %s, training goes on: %s", self.repo_id, error)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)
