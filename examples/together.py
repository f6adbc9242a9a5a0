"""Run a graft together with what people use beside it: ControlNet, LoRA, a cache, quantised storage and offloading.

    python examples/together.py [folder]

The model is a tiny Flux with random weights; `FluxTransformer2DModel.from_pretrained(...)` goes the same way. The
order is: quantise, graft, add LoRA, then enable casting, a cache or offloading. Each line says how far the output
moved. With torchao installed, the linear layers of the original are quantised to 8-bit integers first.
"""

import importlib.util
import sys
from contextlib import contextmanager

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel, PyramidAttentionBroadcastConfig
from peft import LoraConfig

import diffusers_graft  # noqa: F401 - gives every model of diffusers set_graft

SIDE = 8  # tokens of a row
WIDTH = 24


def tiny_flux() -> FluxTransformer2DModel:
    """Make a Flux of two double and two single blocks with random weights, the same every time."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 4),
    ).eval()


def inputs() -> dict[str, torch.Tensor]:
    """Return packed latents with their places, and a prompt."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    return {
        "hidden_states": torch.randn(1, SIDE * SIDE, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 8, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
    }


def quantize(model: FluxTransformer2DModel) -> str:
    """Quantise the linear layers with torchao, where it is installed; returns in words what was done."""
    if importlib.util.find_spec("torchao") is None:
        return "not quantised: pip install torchao"
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return "linear layers quantised to 8-bit integers"


@torch.no_grad()
def run(model: FluxTransformer2DModel, **more) -> torch.Tensor:
    return model(**inputs(), **more).sample


def add_lora(model: FluxTransformer2DModel) -> None:
    """Add a small random LoRA, as one that was loaded from a file."""
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name="style")


@contextmanager
def cached(model: FluxTransformer2DModel):
    """Reuse the attention of every second step inside."""
    model.enable_cache(
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    )
    with model.cache_context("example"):
        yield
    model.disable_cache()


def main(folder: str = "my-flux-graft") -> dict[str, float]:
    model = tiny_flux()
    sys.stdout.write(f"{quantize(model)}\n")
    plain = run(model)
    model.set_graft({"joint_attention[:]": "neighborhood", "self_attention[1]": "hyena_x"})
    moved = {"graft": run(model)}
    model.save_graft(folder)

    controlnet = FluxControlNetModel.from_transformer(tiny_flux(), 1, 1, WIDTH // 2, 2)
    with torch.no_grad():
        # Zero layers are what a new ControlNet ends in; a trained one has others.
        for layer in (*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks):
            torch.nn.init.normal_(layer.weight, std=0.05)
        edges = torch.ones(1, SIDE * SIDE, 4)
        samples, single_samples = controlnet(**inputs(), controlnet_cond=edges, return_dict=False)
    moved["graft + ControlNet"] = run(
        model, controlnet_block_samples=samples, controlnet_single_block_samples=single_samples
    )

    add_lora(model)
    moved["graft + LoRA"] = run(model)
    with cached(model):
        run(model)
        moved["graft + LoRA + cache"] = run(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.enable_group_offload(
        onload_device=device, offload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    moved["graft + LoRA + offloading"] = run(model)

    cast = tiny_flux().to(torch.bfloat16)
    cast.load_graft(folder, allow_base_mismatch=True)
    # Stored in 8 bits, computed in 16; the graft's own operators stay as they are.
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        halved = {name: value.bfloat16() for name, value in inputs().items()}
        moved["graft + float8 storage"] = cast(**halved).sample.float()

    distances = {}
    for name, output in moved.items():
        distances[name] = ((output - plain).norm() / plain.norm()).item()
        sys.stdout.write(f"{name}: {distances[name]:.3f} of the original's output\n")
    return distances


if __name__ == "__main__":
    main(*sys.argv[1:])
