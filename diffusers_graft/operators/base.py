"""The contract of an operator: what a contributor writes, and what the rest of the library may rely on.

An operator is one file; its file name is its name. It knows torch and einops, nothing of diffusers: sizes come from
the `Site`, geometry from the `Context`. Legend for shapes: B batch, H heads, N query tokens, M key tokens, D width, E
head width.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import nn

from ..core.context import Context, ContextSlot, Grid
from ..core.sites import AttentionSite, BlockSite, FeedForwardSite, Site
from ..errors import OperatorError, UnknownNameError

ConfigT = TypeVar("ConfigT", bound="OperatorConfig")
SiteT = TypeVar("SiteT", bound=Site)


def rare(default: Any) -> Any:
    """Make a field of settings that nearly everybody leaves at its default, and whose text then leaves it out."""
    return dataclasses.field(default=default, metadata={"is_rare": True})


@dataclass(frozen=True, kw_only=True)
class OperatorConfig:
    """Settings of an operator: frozen, keyword-only, JSON-able, and never a model size.

    Attributes:
        init: `"warm"` starts from the part that is replaced; `"random"` from scratch, the paper's setting, the
            control.
    """

    owner: ClassVar[type[Operator]]

    init: str = "warm"

    def __post_init__(self):
        if self.init not in ("warm", "random"):
            raise UnknownNameError("init", self.init, ("warm", "random"))

    @property
    def papers(self) -> tuple[str, ...]:
        """Papers of the operator with these settings, as cards cite them: a title, and its number on arXiv."""
        return (self.owner.paper,) if self.owner.paper else ()

    def resolved(self, site: Site) -> Self:
        """Return this config with every None that means "as in the replaced part" filled in from the site."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the operator's name and every setting, JSON-able.

        Defaults are included, so that a changed default never changes a saved graft.
        """
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        nested = {name: value.to_dict() for name, value in settings.items() if isinstance(value, OperatorConfig)}
        return {"operator": self.owner.name, **settings, **nested}

    def build(self, site: Site) -> Operator:
        """Make the operator for a site. Raises `OperatorError` for a site of a kind that it does not replace."""
        return self.owner(self, site)

    def __str__(self) -> str:
        """Return the text that rules take, without settings that have their usual value; `init` comes last."""
        # Written where they differ alone: nearly every config has the first two.
        usual: dict[str, Any] = {"init": "warm", "backend": "torch"}
        for field in dataclasses.fields(self):
            if field.metadata.get("is_rare"):
                usual[field.name] = field.default
        names = [field.name for field in dataclasses.fields(self) if field.name != "init"]
        settings = []
        for name in [*names, "init"]:
            value = getattr(self, name)
            if usual.get(name) != value:
                # Operators within operators are written without quotes.
                text = str(value) if isinstance(value, OperatorConfig) else repr(value)
                settings.append(f"{name}={text}")
        return f"{self.owner.name}({', '.join(settings)})"


def dense_weight(part: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the plain floating-point tensor that a layer's weight stands for.

    Subclasses that hold quantised numbers with their scales, such as torchao's, are dequantised.

    Args:
        part: names what the weight is of, for the message.

    Raises `OperatorError` for numbers that mean nothing without scales stored elsewhere.
    """
    if type(weight).dequantize is not torch.Tensor.dequantize:
        weight = weight.dequantize()
    if not weight.is_floating_point():
        raise OperatorError(
            f'The weights of this {part} are quantised, so nothing can start from them: choose init="random", or '
            "graft first and quantise what stays."
        )
    return weight


def _make_dense(part: str, owner: Any, *names: str) -> None:
    """Replace weights of a frozen dataclass by their `dense_weight`, where there are any."""
    for name in names:
        weight = getattr(owner, name)
        if weight is not None:
            # The only way to set an attribute of a frozen dataclass.
            object.__setattr__(owner, name, dense_weight(part, weight))


@dataclass(frozen=True, kw_only=True)
class LinearPair:
    """A feed-forward as an operator sees the one it replaces: `down(activation(up(x)))`.

    A gated one, with a `gate`, is `down(activation(gate(x)) * up(x))`. Quantised weights are dequantised; raises
    `OperatorError` for those that cannot be.

    Attributes:
        up, down: weights [hidden, D] and [D, hidden].
        up_bias, down_bias: [hidden] and [D], or None.
        activation: diffusers' name; of a gated feed-forward that of its unit, such as `geglu`.
        gate, gate_bias: [hidden, D] and [hidden], or None.
        energy, mean: mean square and mean of every hidden neuron on data, [hidden]; None where no data was measured.
    """

    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    activation: str
    gate: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    def __post_init__(self):
        _make_dense("feed-forward", self, "up", "down", "gate")


@dataclass(frozen=True, kw_only=True)
class Projections:
    """The linear layers of an attention as an operator with projections of its own sees those it replaces.

    Quantised weights are dequantised; raises `OperatorError` for those that cannot be.

    Attributes:
        query, key, value: weights [H * E, D].
        out: weight [D, H * E].
        query_bias, key_bias, value_bias, out_bias: [H * E] and [D], or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    query_bias: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None

    def __post_init__(self):
        _make_dense("attention", self, "query", "key", "value", "out")


def _default_name(operator: type) -> str:
    """Return the name of the file that defines an operator; a script or notebook gives that of the class."""
    module = operator.__module__.rpartition(".")[2]
    if module != "__main__":
        return module
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", operator.__name__).lower()


def _require_frozen(config: type, operator: str) -> None:
    """Raise `OperatorError` unless a class of settings is a frozen dataclass whose fields are keywords."""
    decorator = "decorate it with @dataclass(frozen=True, kw_only=True)"
    if not issubclass(config, OperatorConfig):
        raise OperatorError(
            f"{operator}.Config is not an OperatorConfig: derive it from the Config of its base class."
        )
    # Asked of the class alone: inherited parameters are those of the base class, which says nothing of this one.
    parameters = vars(config).get("__dataclass_params__")
    if parameters is None:
        raise OperatorError(f"{operator}.Config is not a dataclass, so its settings are not read: {decorator}.")
    positional = [field.name for field in dataclasses.fields(config) if field.init and not field.kw_only]
    if not parameters.frozen or positional:
        raise OperatorError(f"{operator}.Config has settings that change, or that are given by position: {decorator}.")


class Operator(nn.Module, Generic[ConfigT, SiteT]):
    """Base of all operators. Class attributes declare capabilities; `check_operator` proves them.

    Where a capability depends on settings, `__init__` sets it on the instance.

    Attributes:
        config, site: what it was built from.
        settings: the config as text.
        slot: holds the context of the running forward.
        name: set from the file name unless given.
        kinds: the kinds of site it can replace.
        needs_grid: whether it asks the context for the layout of tokens.
        honours_mask: whether an attention mask is applied exactly.
        honours_others: whether it may be given more keys than queries: the first N are the queries' own, and every
            query sees the rest besides those (a prompt's), in one softmax.
        honours_causal: whether it is causal where the replaced attention was, as the context says.
        causal_operator: whether a token never sees tokens after it.
        is_plain_softmax: whether it is the replaced softmax itself, which a prompt's tokens may run through as well.
        chooses_tokens: whether the tokens that it reads depend on the data; `receptive_field` names all that it may.
        ignores_attention_backend: whether it uses softmax, but not by the backend that `set_attention_backend` chose.
        paper: title and arXiv id of where it comes from.
        start: one sentence on what a warm start keeps; printed on cards.
        exact_with: settings with which it is the softmax it replaces; empty where there are none.
        unused_inputs: inputs that it does not read, `"input 0"` for the first; they get no gradient.
        idle_parameters: parameters that have nothing to do on small grids, and get no gradient there.
        output_layer: name of the linear layer its output comes from, which `dg.closed_form` solves for; a mixer's is
            the attention's output projection.
        uses_energy: whether a warm start is better for a `LinearPair.energy`, which takes data.

    Optional methods that `check_operator` reads: `reference`, the definition in plain torch with the signature of
    `forward`; `countable`, the same for torch's FLOP counter, where that is misled by `forward`.
    """

    config: ConfigT
    site: SiteT
    settings: str
    slot: ContextSlot

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    start: ClassVar[str] = ""
    exact_with: ClassVar[str] = ""
    Config: ClassVar[type[OperatorConfig]] = OperatorConfig

    # Not ClassVar, since instances may have values of their own.
    needs_grid: bool = False
    honours_mask: bool = False
    honours_others: bool = False
    honours_causal: bool = False
    causal_operator: bool = False
    is_plain_softmax: bool = False
    chooses_tokens: bool = False
    ignores_attention_backend: bool = False
    uses_energy: bool = False
    unused_inputs: tuple[str, ...] = ()
    idle_parameters: tuple[str, ...] = ()
    output_layer: str | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = _default_name(cls)
        if "Config" not in cls.__dict__ or "owner" in vars(cls.Config):
            # Inherited, or another operator's: a class of its own, since a config knows its one operator.
            body = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
            cls.Config = dataclass(frozen=True, kw_only=True)(type("Config", (cls.Config,), body))
        _require_frozen(cls.Config, cls.__name__)
        cls.Config.owner = cls

    def __init__(self, config: ConfigT, site: SiteT):
        super().__init__()
        self.config = config
        self.settings = str(config)
        self.site = site
        self.slot = ContextSlot()
        if site.kind not in self.kinds:
            raise OperatorError(f"{self.name} replaces {' or '.join(self.kinds)}; {site.path} is {site.address}.")

    def init_from(self, original: Any) -> None:
        """Start from the part that is replaced. The default keeps what `__init__` made."""

    @torch.compiler.assume_constant_result
    def constant(self, make: Callable[..., Any], settings: str, *arguments: Any) -> Any:
        """Return `make(config, *arguments)`, which compiled code computes once for all operators of one config.

        Args:
            make: a plain function.
            settings: those of this operator. They stand for its config, which torch 2.11 cannot take as an argument.
            arguments: texts, numbers and tuples.
        """
        return make(self.config, *arguments)

    def flops(self, tokens: int) -> int:
        """Return the floating-point operations of one sample of `tokens` tokens, a multiply-add counting two."""
        # Not abstract, so that a first sketch of an operator runs before it is priced.
        raise OperatorError(f"{self.name} does not say what it costs: define flops(tokens) beside its forward.")

    def bind_context(self, slot: ContextSlot) -> None:
        """Read the context of the running forward from `slot`, here and in all operators within this one."""
        # All at once, when a graft is bound: asking for the holder in each forward would break compiled graphs.
        for part in self.modules():
            if isinstance(part, Operator):
                part.slot = slot

    def last_grid(self, tokens: int) -> Grid | None:
        """Return the grid of the last forward, for `flops` that depend on it; None where it has not so many tokens."""
        grid = self.slot.current.at(self.site, tokens).grid
        if grid is None or grid.tokens != tokens:
            return None
        return grid

    def uncounted_flops(self, tokens: int) -> int:
        """Return the part of `flops` that torch's counter misses; negative where it counts what a mask hides."""
        return 0

    def receptive_field(self, token: int, grid: Grid) -> Collection[int]:
        """Return the tokens that the output at `token` depends on, in raster order.

        These are all, or of a causal operator those up to it.
        """
        if self.causal_operator:
            return range(token + 1)
        return range(grid.tokens)

    @property
    def stays_causal(self) -> bool:
        """Return whether no token sees later ones where the replaced attention was causal."""
        return self.honours_causal or self.causal_operator

    def extra_repr(self) -> str:
        return str(self.config)


class Mixer(Operator[ConfigT, AttentionSite]):
    """Replaces the softmax of an attention and nothing else: projections, norms and rotary embeddings stay.

    `forward(query, key, value, context)` takes [B, H, N, E], [B, H, M, E] twice, and returns [B, H, N, E].

    Attributes:
        needs_hidden_states: whether it reads `context.hidden_states`, [B, N, D]: the input of the attention, of the
            tokens whose queries it is given.
        before_rotary: whether it reads `context.unrotated`, queries and keys before rotary embeddings.

    An attention whose processor cannot give what is declared refuses the operator in words.
    """

    needs_hidden_states: bool = False
    before_rotary: bool = False
    kinds = ("self_attention",)
    start = "queries, keys, values and output projection keep their pretrained weights"

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        raise OperatorError(f"{self.name} has no forward.")

    def require_rotary(self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> None:
        """Raise `OperatorError` where the model's rotary embedding is not of the kind that the settings say.

        Args:
            before, after: queries and keys, [B, H, N, E].
        """

    def mix_parts(
        self,
        mix: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: Context,
    ) -> torch.Tensor:
        """Call `mix(mixer, query, key, value, context)` for every mixer inside this one, on the heads that it serves.

        Returns [B, H, N, E] of all heads. A mixer that is not made of others is called itself.
        """
        return mix(self, query, key, value, context)

    def image_share(self, tokens: int, others: int) -> float | None:
        """Return the share of an image token's output that is this mixer's, beside `others` tokens of a prompt.

        The rest is softmax attention over the prompt. None stands for the share that softmax over both would give.
        """
        return None


class AttentionOperator(Operator[ConfigT, AttentionSite]):
    """Replaces a self-attention together with its projections.

    `forward(hidden_states, context)` takes and returns [B, N, D]. Norms of queries and keys and rotary embeddings of
    the original go with it. `init_from` receives `Projections`.
    """

    kinds = ("self_attention",)

    def forward(self, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
        raise OperatorError(f"{self.name} has no forward.")


class FeedForwardOperator(Operator[ConfigT, FeedForwardSite]):
    """Replaces a feed-forward: `forward(hidden_states, context)` takes and returns [B, N, D].

    `init_from` receives the original as a `LinearPair`. Unless it overrides `receptive_field`, no token sees another.
    """

    kinds = ("feed_forward",)

    def receptive_field(self, token: int, grid: Grid) -> Collection[int]:
        return (token,)

    def forward(self, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
        raise OperatorError(f"{self.name} has no forward.")


class BlockOperator(Operator[ConfigT, BlockSite]):
    """Replaces one block or several neighbours: what they would add to a stream becomes something else.

    `forward(hidden_states, *outputs, context, stream)` takes the input of the blocks, [B, N, D], and the output that
    each of them makes of it, and returns [B, N, D]; `stream` numbers the streams of blocks that carry several (image
    and prompt). An operator that does not run the blocks (`runs_blocks = False`) is given no outputs, and the weights
    of the blocks go with them.
    """

    kinds = ("block_pair", "block", "block_run")
    runs_blocks: ClassVar[bool] = True

    def __init__(self, config: ConfigT, site: BlockSite):
        super().__init__(config, site)
        if not self.runs_blocks:
            # Input 0 is the stream; the others would be the outputs of the blocks.
            self.unused_inputs = tuple(f"input {number}" for number in range(1, site.blocks + 1))

    def receptive_field(self, token: int, grid: Grid) -> Collection[int]:
        return (token,)

    def forward(self, hidden_states: torch.Tensor, *outputs_and_context: Any, stream: int = 0) -> torch.Tensor:
        raise OperatorError(f"{self.name} has no forward.")


BlockPairOperator = BlockOperator
