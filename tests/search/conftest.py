"""A survey of a tiny model that the tests of this room share."""

import pytest

import diffusers_graft as dg

from ..models import SCHEDULER, batches, tiny_dit

CANDIDATES = {
    "self_attention[:2]": ["neighborhood", "self_attention"],
    "feed_forward[1:]": ["linear_mlp", "mlp(expansion=2)"],
}


TAUGHT = dg.DistillConfig(steps=3, lr=1e-3, progress=False)


@pytest.fixture(scope="module")
def surveyed():
    model = tiny_dit()
    found = dg.survey(
        model,
        CANDIDATES,
        batches(2),
        batches=batches(3),
        config=TAUGHT,
        noise_scheduler=SCHEDULER,
        rounds=2,
        progress=False,
    )
    return model, found
