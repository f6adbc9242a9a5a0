"""Two processes end where one does, with the same batches."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError

from ..models import SCHEDULER, batches, tiny_dit
from .sharing import RULES, both_stages

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_what_would_shard_weights_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    model = tiny_dit()
    model.set_graft(RULES)
    with pytest.raises(TrainingError, match="launch without it"):
        dg.finetune(model, batches(), dg.FinetuneConfig(steps=1, progress=False), noise_scheduler=SCHEDULER)


def free_port():
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        return plug.getsockname()[1]


def test_two_processes_are_one(tmp_path):
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                 "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    started = [
        subprocess.Popen([sys.executable, "-m", "tests.training.sharing", str(tmp_path)], cwd=ROOT,
                         env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    alone = both_stages()
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert set(first) == set(alone)
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        if name.endswith("to_k.bias"):
            continue  # softmax does not see it: its gradient is rounding, which Adam makes large
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"training.jsonl", ".checkpoints", "again"}
    resumed = both_stages(tmp_path / "run", resume=True)  # by one process, what two have finished
    assert all(torch.equal(resumed[name], tensor) for name, tensor in first.items())
