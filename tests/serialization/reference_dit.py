"""The computation of the paper's released models, in plain torch, from the equations: no diffusers, nothing of ours.

DiT (arXiv 2212.09748), the operators of arXiv 2506.05340 (section 3) and Mamba-2 (arXiv 2405.21060, section 7), token
by token where there is a recurrence. Modules have the names that the released checkpoints have.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Softmax attention over all tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.proj(softmax_attention(self.qkv(x), self.heads, torch.zeros(x.shape[1], x.shape[1])))


class SlidingWindow(nn.Module):
    """Softmax attention over the four tokens before and after each token."""

    def __init__(self, width, heads, window=4):
        super().__init__()
        self.heads, self.window = heads, window
        self.Wqkv, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        far = (places[:, None] - places[None]).abs() > self.window
        return self.out_proj(
            softmax_attention(self.Wqkv(x), self.heads, torch.zeros(far.shape).masked_fill(far, -math.inf))
        )


def softmax_attention(qkv, heads, bias):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Filter(nn.Conv1d):
    """y[n] = sum_i w[i] x[n - K + 1 + i] + b, one filter a channel, along the last axis."""

    def __init__(self, channels, taps):
        super().__init__(channels, channels, taps, groups=channels)

    def forward(self, x):
        taps, length = self.weight.shape[-1], x.shape[-1]
        padded = torch.cat([x.new_zeros(*x.shape[:-1], taps - 1), x], -1)
        return self.bias[:, None] + sum(self.weight[:, 0, i, None] * padded[..., i : i + length] for i in range(taps))


class Hyena(nn.Module):
    """y = out(q * inner(k * v)), with q, k, v = short(in(x)); SE has both filters, X the first, Y the second."""

    def __init__(self, width, taps=4, short=True, inner=True):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if short:
            self.short_filter = Filter(3 * width, taps)
        if inner:
            self.inner_filter = Filter(width, taps)

    def forward(self, x):
        u = self.in_proj(x).transpose(1, 2)
        u = self.short_filter(u) if hasattr(self, "short_filter") else u
        q, k, v = u.chunk(3, dim=1)
        v = self.inner_filter(k * v) if hasattr(self, "inner_filter") else k * v
        return self.out_proj((q * v).transpose(1, 2))


class GatedNorm(nn.Module):
    """RMS norm of y * silu(z)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y, z):
        y = y * F.silu(z)
        return self.weight * y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


class Mamba2(nn.Module):
    """h_n = exp(A dt_n) h_(n-1) + dt_n B_n x_n; y_n = C_n h_n + D x_n, a head at a time."""

    def __init__(self, width, state=8, head=4, expand=2, taps=4):
        super().__init__()
        self.inner, self.state, self.head = expand * width, state, head
        heads, channels = self.inner // head, self.inner + 2 * state
        self.in_proj = nn.Linear(width, 2 * self.inner + 2 * state + heads, bias=False)
        self.conv1d = Filter(channels, taps)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.zeros(heads)) for _ in range(3))
        self.norm, self.out_proj = GatedNorm(self.inner), nn.Linear(self.inner, width, bias=False)

    def forward(self, tokens):
        z, xbc, dt = self.in_proj(tokens).split([self.inner, self.inner + 2 * self.state, len(self.D)], dim=-1)
        xbc = F.silu(self.conv1d(xbc.transpose(1, 2)).transpose(1, 2))
        x, b, c = xbc.split([self.inner, self.state, self.state], dim=-1)
        x, dt = x.unflatten(-1, (-1, self.head)), F.softplus(dt + self.dt_bias)
        h, outputs = torch.zeros(len(x), len(self.D), self.head, self.state), []
        for n in range(x.shape[1]):
            decay = torch.exp(-self.A_log.exp() * dt[:, n])
            h = decay[..., None, None] * h + (dt[:, n, :, None] * x[:, n])[..., None] * b[:, n, None, None]
            outputs.append((h * c[:, n, None, None]).sum(-1) + self.D[:, None] * x[:, n])
        return self.out_proj(self.norm(torch.stack(outputs, 1).flatten(2), z))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), the tanh form of gelu."""

    def __init__(self, width, ratio=4):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, int(ratio * width)), nn.Linear(int(ratio * width), width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


class MlpHyena(nn.Module):
    """out(q * k * v), q, k, v = filter(in(x)) along the features, one filter a token."""

    def __init__(self, width, tokens, ratio=2, taps=4):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, 3 * ratio * width), nn.Linear(ratio * width, width)
        self.short_filter = Filter(tokens, taps)

    def forward(self, x):
        q, k, v = self.short_filter(self.in_proj(x)).chunk(3, dim=-1)
        return self.out_proj(q * k * v)


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


class Block(nn.Module):
    def __init__(self, width, attn, mlp):
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part[:, None] for part in self.adaLN_modulation(c).chunk(6, -1)
        )
        x = x + gate_a * self.attn(norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(norm(x) * (1 + scale_m) + shift_m)


def one_axis(width, places):
    angles = places.double()[:, None] / 10000 ** (torch.arange(width // 2).double() / (width / 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


def positions(width, side):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([one_axis(width // 2, columns.flatten()), one_axis(width // 2, rows.flatten())], 1)[None].float()


class Named(nn.Module):
    """Holds modules by the names given."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class ReferenceDiT(nn.Module):
    def __init__(self, attns, mlps, width=16, size=8, patch=2, channels=2, labels=5):
        super().__init__()
        self.patch, self.side, self.out = patch, size // patch, 2 * channels
        self.x_embedder = Named(proj=nn.Conv2d(channels, width, patch, patch))
        self.t_embedder = Named(mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))
        self.y_embedder = Named(embedding_table=nn.Embedding(labels + 1, width))
        self.pos_embed = nn.Parameter(positions(width, self.side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, attn, mlp) for attn, mlp in zip(attns, mlps, strict=True))
        self.final_layer = Named(
            linear=nn.Linear(width, patch**2 * self.out),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        )

    def forward(self, latents, t, y):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = t.float()[:, None] * frequencies
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1)) + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(latents).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = (part[:, None] for part in self.final_layer.adaLN_modulation(c).chunk(2, -1))
        x = self.final_layer.linear(norm(x) * (1 + scale) + shift)
        image = x.view(-1, self.side, self.side, self.patch, self.patch, self.out).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, self.out, self.side * self.patch, self.side * self.patch)


WIDTH, HEADS, TOKENS, LAYERS = 16, 2, 16, 4
ATTENTIONS = {
    "mha": lambda: Attention(WIDTH, HEADS),
    "swa": lambda: SlidingWindow(WIDTH, HEADS),
    "hyena_se": lambda: Hyena(WIDTH),
    "hyena_x": lambda: Hyena(WIDTH, inner=False),
    "hyena_y": lambda: Hyena(WIDTH, taps=3, short=False),
    "mamba2": lambda: Mamba2(WIDTH),
}
MLPS = {
    "mlp_r4": lambda: Mlp(WIDTH),
    "mlp_r3": lambda: Mlp(WIDTH, 3),
    "mlp_r6": lambda: Mlp(WIDTH, 6),
    "mlp_hyena_x": lambda: MlpHyena(WIDTH, TOKENS),
}


def reference(attn="mha", mlp="mlp_r4", layers=LAYERS, replaced=None):
    """The blocks `replaced`, every second one unless given, have the operators named; all parameters are random, so
    that nothing hides behind a zero gate.
    """
    torch.manual_seed(0)
    replaced = range(1, layers, 2) if replaced is None else replaced
    attns = [ATTENTIONS[attn if layer in replaced else "mha"]() for layer in range(layers)]
    mlps = [MLPS[mlp if layer in replaced else "mlp_r4"]() for layer in range(layers)]
    model = ReferenceDiT(attns, mlps)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.25 * torch.randn(parameter.shape) + (name.endswith("norm.weight")))
    return model.eval()
