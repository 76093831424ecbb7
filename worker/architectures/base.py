"""What a model family must say about itself to be served, and the answers that most families share.

Covers names in checkpoints, embedding, blocks, final norm and head; the arithmetic is `worker.stage`'s. A new family
is one file that subclasses Architecture, its entry in `cluster.model_spec.SUPPORTED_ARCHITECTURES`, and a parity test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cluster.errors import ConfigurationError
from cluster.span import Span
from worker.blocks import LinearUse, StepContext, build_on_meta
from worker.gated import replace_gated_mlps
from worker.rms_norm import replace_rms_norms
from worker.store.key import EMBEDDING, HEAD, block_part, part_block

POSITIONAL_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""

HEAD_KEY = "lm_head."
Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """What is stored and loaded at a time: a block, the final norm and head, or what follows the embedding rows.

    The embedding table is not in the module: stage 0 looks its rows up where they are stored.
    """

    name: str  # in the block store
    key: str  # what the keys of its parameters begin with
    module: nn.Module  # on the meta device
    use: LinearUse


class PlainEmbedding(nn.Module):
    """Token rows as they are."""

    def forward(self, rows: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002 - one signature for all families
        """Map embedding rows `[num_tokens, hidden_size]` to hidden states of the same shape."""
        return rows


class Architecture:
    """One model family, for one config. Keys are those of the checkpoint, relative to the base model."""

    block_class: ClassVar[Any]  # transformers' block, called with (config, block number)
    norm_class: ClassVar[Any] = nn.LayerNorm  # of the final norm
    norm_epsilon: ClassVar[str] = "rms_norm_eps"  # the config's name for it
    rotary_class: ClassVar[Any] = None
    activation: ClassVar[str] = "mlp.act_fn"  # the block's elementwise function

    shared_inputs: ClassVar[tuple[tuple[str, ...], ...]] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    """Linear layers of one module that multiply the same input, in order of use."""
    use_last: ClassVar[tuple[str, ...]] = ()
    """Linear layers that a block uses after those that its definition names later."""
    unquantized: ClassVar[tuple[str, ...]] = ()  # linear layers that stay in the compute dtype, within a block
    experts_name: ClassVar[str] = ""  # of the list of experts within a block
    num_chosen_experts: int = 0  # per token

    prefix: ClassVar[str] = "model."  # the base model's name in the checkpoint, which may be absent there
    blocks_key: ClassVar[str] = "layers."
    embedding_key: ClassVar[str] = "embed_tokens.weight"
    norm_key: ClassVar[str] = "norm."
    head_keys: ClassVar[tuple[str, ...]] = (HEAD_KEY + "weight",)  # names of an untied head, without prefix

    def __init__(self, config: Any) -> None:
        self.config = config
        self.num_blocks: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden_size // self.num_heads
        self._check_rotary()

    def adapt_block(self, block: Any) -> None:
        """Replace what must be replaced in a block as transformers builds it, linear layers aside."""

    def make_embedding(self) -> nn.Module:
        """Make what follows the embedding rows: `(rows, positions) -> hidden states`."""
        return PlainEmbedding()

    def run_block(self, block: nn.Module, hidden: Tensor, step: StepContext) -> Tensor:
        """Compute `[1, num_tokens, hidden_size]` from the same shape."""
        out: Tensor = block(hidden, attention_mask=None, position_embeddings=step.position_embeddings, step=step)
        return out

    def checkpoint_keys(self, key: str) -> tuple[str, ...]:
        """Return the names that a checkpoint may use for `key`, the likeliest first."""
        names = (self.prefix + key, key)
        if key == HEAD_KEY + "weight":
            return (*self.head_keys, *self._if_tied(self.embedding_key, self.prefix + self.embedding_key))
        if key == self.embedding_key:
            return (*names, *self._if_tied(*self.head_keys))
        return names

    def _if_tied(self, *names: str) -> tuple[str, ...]:
        """Return the names under which one of embedding and head stands for the other. As in transformers, a head of
        its own in the checkpoint counts, whatever the config says."""
        return names if self.config.tie_word_embeddings else ()

    def rotary_table(self, num_positions: int, dtype: torch.dtype, device: torch.device | str) -> Rotary | None:
        """Return cos and sin, each `[num_positions, rotary_dim]`, by transformers' own formula."""
        if self.rotary_class is None:
            return None
        positions = torch.arange(num_positions)[None]
        cos, sin = self.rotary_class(self.config)(torch.empty(0, dtype=dtype), positions)
        return cos[0].to(device), sin[0].to(device)

    def parts(self, span: Span, *, is_first: bool, is_last: bool) -> list[Part]:
        """Build what the stage of a span holds, in order of use."""
        names = [
            *([EMBEDDING] if is_first else []),
            *map(block_part, span.blocks()),
            *([HEAD] if is_last else []),
        ]
        return [self.build_part(name) for name in names]

    def build_part(self, name: str) -> Part:
        """Build a part, by its name in the block store."""
        block = part_block(name)
        if block is not None:
            return Part(name, self.block_key(block), self.build_block(block), self.linear_use)
        return Part(name, "", self.build_head() if name == HEAD else self.build_embedding(), self.linear_use)

    @property
    def linear_use(self) -> LinearUse:
        """How the linear layers of a block are used."""
        return LinearUse(self.shared_inputs, self.use_last, self.unquantized, self.experts_name)

    def block_key(self, block: int) -> str:
        """Return what the keys of a block's parameters begin with."""
        return f"{self.blocks_key}{block}."

    def build_block(self, block: int) -> nn.Module:
        """Build one block on the meta device."""

        def build() -> nn.Module:
            built: nn.Module = self.block_class(self.config, block)
            self.adapt_block(built)
            replace_rms_norms(built)
            replace_gated_mlps(built)
            return built

        return build_on_meta(build)

    def build_embedding(self) -> nn.Module:
        """Build what follows the embedding rows on the meta device."""
        return build_on_meta(self.make_embedding)

    def build_norm(self) -> nn.Module:
        """Build the final norm on the meta device."""
        epsilon = getattr(self.config, self.norm_epsilon)
        return build_on_meta(lambda: self.norm_class(self.hidden_size, eps=epsilon))

    def build_head(self) -> nn.Module:
        """Build final norm and head on the meta device, by the names of their keys."""
        head = build_on_meta(lambda: nn.Linear(self.hidden_size, self.vocab_size, bias=False))
        return nn.ModuleDict({self.norm_key.rstrip("."): self.build_norm(), HEAD_KEY.rstrip("."): head})

    def _check_rotary(self) -> None:
        kind = (getattr(self.config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind not in POSITIONAL_ROTARY:
            raise ConfigurationError(
                f"the model's rotary embedding is of type {kind!r}, whose angles depend on the longest sequence being "
                f"computed, so that one user's text would change another's; Spanwise serves "
                f"{', '.join(POSITIONAL_ROTARY)}: choose a variant of the model with a fixed context (often named 4k)"
            )
