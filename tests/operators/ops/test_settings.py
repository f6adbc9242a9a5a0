"""Settings that cost time or memory without showing in a tensor's size have an upper bound."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_graft.errors import GraftError, OperatorError
from diffusers_graft.operators import configure

from ...models import tiny_dit


class Operations(TorchDispatchMode):
    """Counts torch's operations, which would never end if such a setting were believed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        assert self.count < 100_000
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("operator", "setting", "most"),
    [
        ("moe_mlp", "experts", 256),
        ("ttt", "steps", 128),
        ("mamba2", "chunk", 1024),
        ("gated_deltanet", "chunk", 1024),
    ],
)
def test_costly_settings_end_at_a_bound(operator, setting, most):
    configure({"operator": operator, setting: most})
    with pytest.raises(
        OperatorError, match=rf"{operator}: {setting} is a whole number from \d to {most}; got {most + 1}"
    ):
        configure({"operator": operator, setting: most + 1})


@pytest.mark.parametrize(
    ("rules", "setting", "value"),
    [
        ({"feed_forward[1]": "moe_mlp"}, "experts", 10**9),
        ({"feed_forward[1]": "moe_mlp"}, "experts", 255),
        ({"feed_forward[1]": "hyena_mlp"}, "positions", 10**12),
        ({"feed_forward[1]": "mlp"}, "expansion", 1e15),
        ({"self_attention[1]": "ttt"}, "steps", 10**7),
        ({"self_attention[1]": "mamba2"}, "state", 10**10),
        ({"self_attention[1]": "mamba2"}, "chunk", 10**6),
        ({"self_attention[1]": "hyena_x"}, "kernel_size", 10**9),
        ({"self_attention[1]": "pooled_keys"}, "stride", 10**6),
    ],
    ids=str,
)
def test_a_description_that_asks_for_endless_work_is_refused_before_anything_is_built(rules, setting, value, tmp_path):
    model = tiny_dit()
    model.set_graft(rules)
    model.save_graft(tmp_path)
    file = tmp_path / "graft_model.safetensors"
    with safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()["graft_config"])
    description["plan"]["edits"][0][setting] = value
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"graft_config": json.dumps(description)})
    (tmp_path / "graft_config.json").write_text(json.dumps(description))
    victim = tiny_dit()
    with Operations() as operations, pytest.raises(GraftError):
        victim.load_graft(tmp_path)
    assert operations.count < 5000
    assert victim.graft is None
