"""Building a graft: seeds, devices, and what it shares."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_graft as dg

from ..inspection.models import exported
from ..models import tiny_dit
from .flux import FLUX


def test_a_shared_self_graft_shares_and_adds_nothing():
    model = tiny_dit()
    names = list(model.state_dict())
    model.set_graft({"self_attention[:]": "self_attention"})
    assert list(model.state_dict()) == names
    assert model.graft.tensors(model) == {}


def test_building_leaves_torchs_generator_alone_and_follows_its_seed():
    model = tiny_dit()
    plan = dg.plan_graft(model, {"self_attention[:]": {"operator": "hyena_x", "init": "random"}})
    state = torch.get_rng_state()
    grafts = [dg.build_graft(model, plan, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (graft.tensors(model) for graft in grafts)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_projections_that_start_at_random_are_drawn_alike_in_every_precision():
    rules = {"self_attention[0]": {"operator": "hyena_x", "init": "random"}}
    one, half = tiny_dit(), tiny_dit().to(torch.bfloat16)
    one.set_graft(rules)
    half.set_graft(rules)
    drawn, rounded = (model.graft.tensors(model) for model in (one, half))
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in drawn.items())


class CountWork(TorchDispatchMode):
    """Counts torch operations, and the bytes of what they make off the meta device."""

    def __init__(self):
        super().__init__()
        self.operations = 0
        self.allocated = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(output, torch.Tensor) and not output.is_meta:
            self.allocated += output.nbytes
        return output


def test_a_model_of_full_size_on_meta_is_grafted_without_work_and_memory():
    with torch.device("meta"):
        model = exported()[FLUX]()
    sites = dg.find_sites(model)
    with CountWork() as work:
        model.set_graft(
            {
                "joint_attention[:]": "neighborhood",
                "self_attention[:]": "hyena_x",
                "feed_forward[:]": {"operator": "mlp", "expansion": 4},
            }
        )
    assert [len(sites.where(kind=kind)) for kind in ("joint_attention", "self_attention", "feed_forward")] == [
        19,
        38,
        38,
    ]
    assert work.operations < 100 * len(model.graft.plan.edits)
    assert work.allocated < 2**20
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.graft.tensors(model).values()])


def test_a_graft_shows_its_parts_in_notebooks():
    graft = dg.build_graft(model := tiny_dit(), dg.plan_graft(model, {"self_attention[1::2]": "hyena_x"}))
    graft.history.append({"stage": "one", "sites": [{"site": "self_attention[1]", "relative_error": 0.25}]})
    own = sum(tensor.numel() for tensor in graft.tensors_of("transformer_blocks.1.attn1").values())
    row = graft.to_table().rows[0]
    assert row == ("self_attention[1]", str(graft.plan.edits[0].config), f"{own:,}", "25.0%")
    assert "hyena_x" in graft._repr_html_()
