"""Short runs of both stages on tiny models, for the tests of training."""

import torch

import diffusers_graft as dg

from ..models import SCHEDULER, batches, tiny_dit

RANDOM = {"operator": "self_attention", "init": "random"}
HYENA = {"operator": "hyena_x", "init": "random"}


class StopError(Exception):
    """Ends a run as an error of the program would."""


class StopAt:
    """A callback that raises `StopError` after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step >= self.step:
            raise StopError


class CallsVerb:
    """A callback that calls a verb of the model after a step."""

    def __init__(self, verb, *arguments, step=1):
        self.verb, self.arguments, self.step = verb, arguments, step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.verb(*self.arguments)


def distill_config(steps=4, **settings):
    return dg.DistillConfig(**{"steps": steps, "lr": 1e-3, "progress": False, **settings})


# The paper's stage two: the model's own objective, without a teacher.
PAPER = {"denoising": 1.0, "distill_output": 0.0, "distill_features": 0.0}


def finetune_config(steps=3, **settings):
    return dg.FinetuneConfig(**{"steps": steps, "lr": 1e-3, "progress": False, **PAPER, **settings})


def build(rules, seed=0):
    """A tiny model, and a graft beside it."""
    model = tiny_dit()
    return model, dg.build_graft(model, dg.plan_graft(model, rules), seed=seed)


def grafted_model(make=tiny_dit, rules=None):
    """A tiny model with its graft installed."""
    model = make()
    model.set_graft(rules or {"self_attention[1::2]": HYENA})
    return model


ARGUMENTS = ("held_out", "output_dir", "resume", "callbacks", "null_prompt")


def run_distill(rules, model=None, data=None, *, scheduler=SCHEDULER, **settings):
    """Model, graft and reports after stage one."""
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    model = model or tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, rules))
    config = distill_config(**{"steps": 3, **settings})
    return model, graft, dg.distill(model, graft, data or batches(), config, noise_scheduler=scheduler, **arguments)


def run_finetune(model, data=None, scheduler=SCHEDULER, **settings):
    """Losses of stage two of a grafted model."""
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    return dg.finetune(model, data or batches(), finetune_config(**settings), noise_scheduler=scheduler, **arguments)


def calls_of(model):
    """Calls of every block from now on."""
    counts = [0] * len(model.transformer_blocks)
    for number, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    return counts


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def same(one, other):
    """Whether two dicts of tensors have the same names in the same order, and equal values."""
    return list(one) == list(other) and all(torch.equal(one[name], tensor) for name, tensor in other.items())


def poisoned():
    """Two batches, the second with a value that is not finite."""
    good, bad = batches(2)
    bad["sample"][0] = float("nan")
    return [good, bad]


def interrupted():
    """Two batches, then Ctrl-C."""
    yield from batches(2)
    raise KeyboardInterrupt
