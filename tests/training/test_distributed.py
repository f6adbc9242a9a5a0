"""Two processes end where one does, with the same batches; also where weights are sharded over them."""

import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.training import distributed as processes

from ..models import SCHEDULER, batches, tensors_of, tiny_dit
from .sharded_runs import WAYS, Stop, every_setting, train
from .shared_runs import RULES, both_stages

ROOT = Path(__file__).parents[2]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REFUSED = {
    "launch with --use_fsdp --fsdp_version 2": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "launch with --fsdp_version 2": {**SHARDED, "FSDP_VERSION": "1"},
    "launch without --fsdp_offload_params": {**SHARDED, "FSDP_OFFLOAD_PARAMS": "true"},
    "torch.optim.Adafactor cannot step": SHARDED,
}


@pytest.mark.parametrize("words", REFUSED)
def test_unsupported_launches_are_refused_before_anything_changes(words, monkeypatch):
    alone = processes.process_state()
    for name, value in REFUSED[words].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(alone, "num_processes", 2)
    model = tiny_dit()
    model.set_graft(RULES)
    before = tensors_of(model)
    config = dg.FinetuneConfig(steps=1, progress=False, optimizer="Adafactor")
    with pytest.raises(TrainingError, match=words):
        dg.finetune(model, batches(), config, noise_scheduler=SCHEDULER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def free_port():
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        return plug.getsockname()[1]


def fork_two(compute, folder, **variables):
    """What `compute` returns in each of two processes; they have all modules already, which saves most of the time."""
    variables |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    variables |= {"ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def run(rank):
        os.environ |= {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        PartialState._reset_state()
        torch.set_num_threads(1)
        save_file(compute(), folder / f"{rank}.safetensors")
        PartialState().destroy_process_group()

    started = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
        process.kill()
    assert [process.exitcode for process in started] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def two_processes(program, folder, **variables):
    """What each of two processes has written to a folder."""
    variables |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", program, str(folder)],
            cwd=ROOT,
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def assert_as_alone(first, second, alone):
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        if name.endswith("to_k.bias"):
            continue  # softmax does not see it: its gradient is rounding, which Adam makes large
        torch.testing.assert_close(
            first[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "variables", [{}, pytest.param(SHARDED, marks=pytest.mark.long)], ids=["full weights", "sharded weights"]
)
def test_two_processes_are_one(variables, tmp_path):
    first, second = two_processes("tests.training.shared_runs", tmp_path, **variables)
    alone = both_stages()
    assert set(first) == set(alone)
    assert_as_alone(first, second, alone)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"training.jsonl", ".checkpoints", "again"}
    resumed = both_stages(tmp_path / "run", resume=True)  # by one process, what two have finished
    assert all(torch.equal(resumed[name], tensor) for name, tensor in first.items())


def sharded_run(folder):
    """Weights of a run that goes on from its shards, and of one that was not stopped, with recomputed blocks."""
    train("lora", folder / "lora", callbacks=[Stop()])
    resumed = train("lora", folder / "lora", resume=True)
    return {**train("half"), **resumed, **{f"whole.{name}": tensor for name, tensor in train("lora").items()}}


def test_processes_write_and_read_their_own_shards(tmp_path, monkeypatch):
    monkeypatch.setitem(WAYS, "half", {"precision": "bf16", "lr": 1e-4, "optimizer": "SGD"})
    more = {**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    first, second = fork_two(lambda: sharded_run(tmp_path), tmp_path, **more)
    lora = {name: tensor for name, tensor in first.items() if name.startswith("lora.")}
    assert len(lora) > 50
    assert all(torch.equal(first[f"whole.{name}"], tensor) for name, tensor in lora.items())
    alone = train("half")
    assert_as_alone(first, second, alone)
    checkpoint = tmp_path / "lora" / ".checkpoints" / "stage-two-00000004"
    files = sorted(path.name for path in checkpoint.iterdir())
    assert [name.partition("-model")[0] for name in files] == ["shard-00001", "shard-00002", "state.json"]
    # By one process, what two have finished.
    assert all(
        torch.equal(tensor, lora[name]) for name, tensor in train("lora", tmp_path / "lora", resume=True).items()
    )
    (checkpoint / files[0]).write_bytes(b"half of it")
    again = train("lora", tmp_path / "lora", resume=True)
    assert_as_alone(again, again, lora)


def test_the_worked_configuration_of_eight_gpus_is_what_accelerate_and_recipes_read():
    from accelerate.commands.config.config_args import load_config_from_file

    from diffusers_graft.recipes.reading import load_recipe

    folder = ROOT / "examples" / "eight_gpus"
    config = load_config_from_file(str(folder / "accelerate.yaml"))
    assert (config.num_processes, config.mixed_precision, config.fsdp_config["fsdp_version"]) == (8, "bf16", 2)
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.distill.split_sites
    assert recipe.finetune.lora.r == 64


@pytest.mark.long
def test_every_setting_of_stage_two_with_sharded_weights(tmp_path):
    first, second = two_processes("tests.training.sharded_runs", tmp_path, **SHARDED)
    held, total = first.pop("share").tolist()
    assert held < 0.6 * total
    resumed = [name for name in first if name.startswith("resumed.")]
    assert len(resumed) > 100
    assert all(torch.equal(first[name], first[name.removeprefix("resumed.")]) for name in resumed)
    assert_as_alone(first, second, every_setting())
