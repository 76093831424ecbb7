"""Transformer blocks over our own parts: attention over the paged cache, linears over stored weights.

Covers what every architecture shares: how a block from transformers reaches the cache, and how its parameters, built
on torch's meta device, are replaced by loaded ones. Which blocks a model has is `worker.architectures`' business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from cluster.model_spec import WeightCount
from worker.attention import attend
from worker.decode_attention import DecodePlans
from worker.kv_cache import AttentionLayout, KVCache

ATTENTION_NAME = "spanwise_paged"
"""What a config's attention implementation is set to, so that transformers' blocks call `paged_attention`."""

_EXACT_ALIGNMENT = 64  # elements: no vector loop of torch's leaves a scalar remainder
_EXACT_PIECE = 16384  # elements: below what torch splits among threads


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the blocks of a span share during one step."""

    cache: KVCache
    layout: AttentionLayout
    first_block: int  # of the span: the cache counts from it
    position_embeddings: tuple[Tensor, Tensor] | None  # rotary cos and sin, each [1, num_tokens, rotary_dim]
    is_exact: bool
    plans: DecodePlans = field(default_factory=DecodePlans)

    def attend(
        self,
        block: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """Attend with `[num_tokens, heads, head_dim]`, rotated here if the model has rotary embeddings; return
        `[num_tokens, num_heads, head_dim]`."""
        return attend(
            query,
            key,
            value,
            self.cache,
            block - self.first_block,
            self.layout,
            scale=scale,
            rotary=self.position_embeddings,
            window=window,
            alibi_slopes=alibi_slopes,
            is_exact=self.is_exact,
            plans=self.plans,
        )


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # noqa: ARG001 - the layout says what a token may see
    *,
    scaling: float,
    step: StepContext,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention that transformers' blocks call, by the signature of its AttentionInterface: those of models without
    rotary embeddings, see `worker.rotary_attention` for the others."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return step.attend(module.layer_idx, query, key, value, scale=scaling).unsqueeze(0), None


def register_attention() -> None:
    """Make `paged_attention` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


class ExactActivation(nn.Module):
    """An elementwise function whose bits do not depend on where in a tensor an element stands.

    torch computes the end of a tensor, or of a thread's share, with scalar code whose exponential differs in the last
    bit from the vectorized one; aligned pieces below the threading limit never reach it.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        flat = functional.pad(x.reshape(-1), (0, -x.numel() % _EXACT_ALIGNMENT))
        pieces = [self.inner(piece) for piece in torch.split(flat, _EXACT_PIECE)]
        return torch.cat(pieces)[: x.numel()].view(x.shape)


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of a part, as transformers builds it."""

    name: str  # within the part, like "self_attn.q_proj"
    shape: tuple[int, int]  # (out, in)
    has_bias: bool
    is_transposed: bool  # stored [in, out]


@dataclass(frozen=True, slots=True)
class LinearUse:
    """How a family uses its linear layers, by their names within a module; see Architecture."""

    shared_inputs: tuple[tuple[str, ...], ...] = ()
    use_last: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()  # by their names within the part
    experts_name: str = ""  # of the list of experts within the part

    def expert(self, layer: str) -> int | None:
        """Return the number of the expert that a layer of the part belongs to."""
        is_expert = bool(self.experts_name) and layer.startswith(self.experts_name + ".")
        return int(layer.removeprefix(self.experts_name + ".").partition(".")[0]) if is_expert else None


class WeightSource(Protocol):
    """Where `materialize` gets a part's weights, by their names within it."""

    def linears(self, layers: Sequence[LinearLayer]) -> list[nn.Module]:
        """Return linear layers that will be called with one input, in this order."""
        ...

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """Return a small tensor (a norm's, a position table) in the compute dtype, on the device."""
        ...

    def buffer(self, value: Tensor) -> Tensor:
        """Return a computed buffer, on the device."""
        ...


def linear_groups(module: nn.Module, use: LinearUse, name: str = "") -> list[tuple[LinearLayer, ...]]:
    """Return the linear layers of `module`, which is called `name` within its part, in order of use.

    Those that share an input are together: the order of conversion, of reading and of computing is this one.
    """
    groups: list[tuple[LinearLayer, ...]] = []
    placed: set[str] = set()
    children = sorted(module.named_children(), key=lambda child: child[0] in use.use_last)
    linears = {child_name: child for child_name, child in children if linear_shape(child) is not None}
    for child_name, child in children:
        if child_name not in linears:
            groups += linear_groups(child, use, f"{name}{child_name}.")
        elif child_name not in placed:
            together = next((names for names in use.shared_inputs if child_name in names), (child_name,))
            present = [other for other in together if other in linears]
            placed.update(present)
            groups.append(tuple(_describe_linear(name + other, linears[other]) for other in present))
    return groups


def _describe_linear(name: str, module: nn.Module) -> LinearLayer:
    shape = linear_shape(module)
    assert shape is not None
    return LinearLayer(name, shape, getattr(module, "bias", None) is not None, isinstance(module, Conv1D))


def small_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of what is not a linear layer's weight, by name within the module: norms, biases, tables."""
    weights = {f"{name}.weight" for name, child in module.named_modules() if linear_shape(child) is not None}
    return {name: found.shape for name, found in module.named_parameters() if name not in weights}


def materialize(module: nn.Module, use: LinearUse, source: WeightSource) -> nn.Module:
    """Replace the meta parameters of `module`, a part, and every linear layer in it."""
    for group in linear_groups(module, use):
        for layer, built in zip(group, source.linears(group), strict=True):
            module.set_submodule(layer.name, built)
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            loaded = nn.Parameter(source.tensor(name, parameter.shape), requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, loaded)
    for name, buffer in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, source.buffer(buffer))
    return module


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module without memory, for inference."""
    with torch.device("meta"):
        return build().eval()


def count_weights(
    module: nn.Module, unquantized: Collection[str] = (), is_kept: Callable[[str], bool] = lambda _: False
) -> WeightCount:
    """Count what the checkpoint holds for `module`. Linear layers named in `unquantized` count as small; `is_kept`
    names those that a quantized checkpoint left in 16 bits."""
    linears = {name: shape for name, child in module.named_modules() if (shape := linear_shape(child)) is not None}
    stored = {name: shape for name, shape in linears.items() if name not in unquantized}
    quantized = [shape for name, shape in stored.items() if not is_kept(name)]
    num_linear = sum(num_rows * num_columns for num_rows, num_columns in quantized)
    num_kept = sum(num_rows * num_columns for num_rows, num_columns in stored.values()) - num_linear
    num_small = sum(parameter.numel() for parameter in module.parameters()) - num_linear - num_kept
    return WeightCount(num_linear, sum(num_rows for num_rows, _ in quantized), num_kept, num_small)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return `(out, in)` of a linear layer as transformers builds them; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return None
