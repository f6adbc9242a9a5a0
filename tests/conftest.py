"""Nothing here may leave the machine, and no test may lean on another's random state."""

import logging
import os
import socket

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import, and inherited by the processes that tests start
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TQDM_DISABLE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers have the cores already

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are interpreted on the CPU; read as triton is imported

from diffusers_graft.operators import registry


def _is_local(family, address):
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    return address[0] in ("localhost", "::1") or address[0].startswith("127.")


@pytest.fixture(autouse=True)
def network_attempts(monkeypatch):
    """Refuse every connection beyond this machine; fail the test even where the code under test swallowed the refusal."""
    attempts = []

    def guarded(name):
        original = getattr(socket.socket, name)

        def call(self, *args):
            if not _is_local(self.family, args[-1]):
                attempts.append(args[-1])
                raise ConnectionRefusedError(f"a test tried to reach {args[-1]}")
            return original(self, *args)

        return call

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, guarded(name))
    yield attempts
    assert not attempts, f"the test tried to reach {attempts}"


@pytest.fixture(autouse=True)
def _no_reports(request, monkeypatch):
    """Leave out the reports that runs end with, which take longer than most tests; `tests/reporting` writes them."""
    if "reporting" not in request.path.parts:
        for module in ("trainer", "search.survey"):
            monkeypatch.setattr(f"diffusers_graft.{module}.try_report", lambda folder: None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_level():
    """Put the level of the log back, which the command line sets for its process."""
    logger = logging.getLogger("diffusers_graft")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _registered_operators():
    """Forget the operators that a test registered: a process started by another test does not know them."""
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)
