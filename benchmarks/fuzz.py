"""Hostile files by the thousand: every load ends in time, within the budget of its file, and in words.

Each file is loaded in a process of its own, which is stopped after a while, and whose memory is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, SD3Transformer2DModel
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.cli.verbs import say
from diffusers_graft.errors import GraftError
from diffusers_graft.training.finetune.lora import add_lora

from .hostile_files import GRAFT_CHANGES, MODEL_CHANGES, Change

SECONDS = 5.0
BYTES_A_BYTE = 10
BYTES_BESIDES = 64 * 2**20
_STOPPED_AFTER = 120  # seconds of the clock, of a process that may wait for others on a busy machine
_STOPPED_AFTER_COMPUTING = 12


@dataclass(frozen=True)
class Load:
    """The outcome of one file.

    Attributes:
        number: of the file, which with the seed decides everything about it.
        change: the kind of change.
        outcome: `loaded`, `refused`, `hangs`, or the error that is none of ours.
        seconds: of computing.
        growth: bytes of memory beyond what the process began with.
        allowed: bytes of the budget.
    """

    number: int
    change: str
    outcome: str
    seconds: float
    growth: int
    allowed: int

    @property
    def fault(self) -> str | None:
        """The promise that was broken, if one was."""
        if self.outcome not in ("loaded", "refused"):
            return self.outcome
        if self.seconds > SECONDS:
            return f"{self.seconds:.1f} s"
        if self.growth > self.allowed:
            return f"{self.growth / 2**20:.0f} MiB of {self.allowed / 2**20:.0f}"
        return None


def tiny_dit(num_layers: int = 2) -> ModelMixin:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
    model = DiTTransformer2DModel(**sizes, num_layers=num_layers, num_embeds_ada_norm=5, in_channels=1, out_channels=1)
    return model.eval()


def tiny_sd3() -> ModelMixin:
    torch.manual_seed(0)
    widths = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16}
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "attention_head_dim": 8}
    return SD3Transformer2DModel(**widths, **sizes, num_layers=2, num_attention_heads=2).eval()


@dataclass(frozen=True)
class Source:
    """A sound folder, what to change in it, and how it is loaded."""

    folder: Path
    changes: list[Change]
    make: Callable[[], ModelMixin]
    is_full_model: bool = False


def make_sources(root: Path, operators: Sequence[str] | None = None) -> list[Source]:
    """Save sound grafts and models: every operator, LoRA, compressed updates, a recorded proof, full models.

    Args:
        operators: names of those to save; all unless given.
    """
    rules: list[dict[str, Any]] = []
    for name in operators or dg.operators.available():
        for kind in set(dg.operators.get(name).kinds) & {"self_attention", "feed_forward", "block", "block_pair"}:
            key = f"{kind}[0]" if kind != "block" else "block[1]"
            with contextlib.suppress(GraftError):
                dg.plan_graft(tiny_dit(4), {key: name})
                rules.append({key: name})
    sources = []
    for number, rule in enumerate(rules):
        model = tiny_dit(4)
        model.set_graft(rule)
        model.save_graft(root / f"operator{number}")
        sources.append(Source(root / f"operator{number}", GRAFT_CHANGES, lambda: tiny_dit(4)))
    mixed = {"self_attention[0]": "hyena_x", "feed_forward[1]": {"operator": "mlp", "expansion": 2}}
    adapted = tiny_dit()
    adapted.set_graft(mixed)
    add_lora(adapted, adapted.graft, LoraConfig(r=2, target_modules=["to_q", "proj"]))
    adapted.save_graft(root / "lora", self_contained=True)
    adapted.save_pretrained(root / "lora_model", max_shard_size="20KB")
    trained = tiny_dit()
    trained.set_graft(mixed)
    changed = {
        name: tensor for name, tensor in trained.named_parameters() if ".graft." not in name and "1.ff" not in name
    }
    trained.graft.body.update({name: tensor.detach().clone() for name, tensor in changed.items() if "0.ff" in name})
    with torch.no_grad():
        for name in trained.graft.body:
            changed[name].add_(0.01 * torch.randn_like(changed[name]))
    trained.save_graft(root / "compressed", compress=0.1)
    model = tiny_dit()
    model.set_graft(mixed)
    model.save_pretrained(root / "model", max_shard_size="20KB")
    model.save_pretrained(root / "contained", self_contained=True)
    joint = tiny_sd3()
    joint.set_graft({"joint_attention[0]": "hyena_x"})
    with torch.no_grad():
        text = {"encoder_hidden_states": torch.randn(1, 5, 16), "pooled_projections": torch.randn(1, 16)}
        joint(hidden_states=torch.randn(1, 4, 8, 8), timestep=torch.tensor([7]), **text)
    joint.save_graft(root / "recorded")
    sources += [Source(root / name, GRAFT_CHANGES, tiny_dit) for name in ("lora", "compressed")] * 3
    sources += [Source(root / "recorded", GRAFT_CHANGES, tiny_sd3)] * 3
    sources += [Source(root / "model", MODEL_CHANGES, tiny_dit, is_full_model=True)] * 10
    sources += [Source(root / "lora_model", MODEL_CHANGES, tiny_dit, is_full_model=True)] * 3
    return sources


def load_hostile(number: int, seed: int, sources: list[Source], root: Path) -> Load:
    """Change a copy of a source, and load it in a process of its own."""
    chance = random.Random(f"{seed} {number}")
    source = chance.choice(sources)
    folder = root / "hostile"
    shutil.copytree(source.folder, folder)
    change = chance.choice(source.changes)
    # A change that does not fit this source leaves it as it was.
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        change(folder, chance)
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    outcome, seconds, growth = _measured(source, folder)
    shutil.rmtree(folder)
    return Load(number, change.__name__, outcome, seconds, growth, BYTES_A_BYTE * size + BYTES_BESIDES)


def _measured(source: Source, folder: Path) -> tuple[str, float, int]:
    """Load a folder in a child; what it says, seconds of computing and growth of memory."""
    model = None if source.is_full_model else source.make()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _load_and_tell(source, folder, model, writing)
    os.close(writing)
    with os.fdopen(reading) as file:
        answer = file.read()
    os.waitpid(child, 0)
    if not answer:
        return "hangs", float(_STOPPED_AFTER), 0
    outcome, seconds, growth = json.loads(answer)
    return outcome, seconds, growth


def _load_and_tell(source: Source, folder: Path, model: ModelMixin | None, writing: int) -> None:
    """Run in the child: load, save again what loaded, and write what came of it."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_STOPPED_AFTER)
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CPU, (_STOPPED_AFTER_COMPUTING, _STOPPED_AFTER_COMPUTING))
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 8 * 2**30,) * 2)
        before = _memory("VmRSS")
        started = time.process_time()
        outcome = _outcome(source, folder, model)
        growth = max(_memory("VmHWM") - before, 0)
        os.write(writing, json.dumps([outcome, time.process_time() - started, growth]).encode())
        code = 0
    finally:
        os._exit(code)


def _outcome(source: Source, folder: Path, model: ModelMixin | None) -> str:
    before = {} if model is None else {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        if model is None:
            loaded = dg.load_pretrained(folder)
            _require_finite(loaded)
            loaded.save_pretrained(folder / "again")
        else:
            model.load_graft(folder)
            _require_finite(model)
            model.save_graft(folder / "again")
        return "loaded"
    except GraftError:
        if model is not None and not _is_unchanged(model, before):
            return "a refusal changed the model"
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def _require_finite(model: ModelMixin) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RuntimeError(f"{name} is installed and not finite")


def _is_unchanged(model: ModelMixin, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    if model.graft is not None:
        return True  # it loaded, and its save was refused
    return list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def run(
    files: int,
    seed: int = 0,
    *,
    operators: Sequence[str] | None = None,
    on_load: Callable[[Load], None] = lambda load: None,
) -> list[Load]:
    """Load hostile files one after the other.

    Args:
        operators: as for `make_sources`.
        on_load: called with what came of each.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sources = make_sources(root / "sound", operators)
        loads = []
        for number in range(files):
            loads.append(load_hostile(number, seed, sources, root))
            on_load(loads[-1])
    return loads


def report(loads: list[Load]) -> str:
    """Return figures of a run, and every broken promise."""
    outcomes = Counter(load.outcome for load in loads)
    faults = [load for load in loads if load.fault]
    hangs = [load for load in loads if load.outcome == "hangs" or load.seconds > SECONDS]
    grown = [load for load in loads if load.growth > load.allowed]
    raw = [load for load in loads if load.outcome not in ("loaded", "refused", "hangs")]
    slowest = max(loads, key=lambda load: load.seconds)
    largest = max(loads, key=lambda load: load.growth / load.allowed)
    lines = [
        f"{len(loads):,} files: {outcomes['refused']:,} refused, {outcomes['loaded']:,} loaded and saved again.",
        f"{len(hangs)} hangs over {SECONDS:g} s; the longest load computed for {slowest.seconds:.2f} s "
        f"({slowest.change}).",
        f"{len(grown)} grew beyond 10 x the file and 64 MiB; the largest growth is {largest.growth / 2**20:.0f} MiB, "
        f"{largest.growth / largest.allowed:.0%} of its budget ({largest.change}).",
        f"{len(raw)} raw errors.",
        *(f"  file {load.number}, {load.change}: {load.fault}" for load in faults),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Load hostile files and print what came of them; the exit status is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    loads = run(settings.files, settings.seed, on_load=_say_fault)
    say(report(loads))
    raise SystemExit(1 if any(load.fault for load in loads) else 0)


def _say_fault(load: Load) -> None:
    if load.fault:
        say(f"file {load.number}, {load.change}: {load.fault}")


if __name__ == "__main__":
    main()
