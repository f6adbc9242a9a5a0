"""A Flux under a graft of every kind, shared by several tests."""

import functools

from ..inspection.models import predict, tiny

FLUX = "FluxTransformer2DModel"


RULES = {
    "joint_attention[:]": "neighborhood",
    "self_attention[:]": "hyena_x",
    "feed_forward[0]": {"operator": "mlp", "expansion": 4},
}


@functools.cache
def expected():
    return predict(grafted(), FLUX)


def grafted(rules=RULES, **settings):
    model = tiny(FLUX, **settings)
    model.set_graft(rules)
    return model
