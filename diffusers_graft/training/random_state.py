"""Random numbers of a run: its seed inside, the program's generators as they were afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the host and of `device` inside; they are as they were afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which would seed other devices too, and those are not put back.
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def get_random_state(generator: torch.Generator, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of a run's own generator and of torch's."""
    state = {"noise": generator.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], generator: torch.Generator, device: torch.device) -> None:
    """Set a run's own generator and torch's to a state that `get_random_state` returned."""
    # A checkpoint of a GPU may go on without one.
    generator.set_state(state["noise"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
