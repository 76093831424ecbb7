"""Attention modules of models with rotary embeddings: projections around the paged attention, which rotates.

Covers the three ways in which families name and lay out their projections. transformers' own modules rotate, transpose
and copy in a dozen operations, whose calls take longer than their arithmetic at few rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from worker.blocks import StepContext


class RotaryAttention(nn.Module):
    """Queries, keys and values by a layer each; queries and keys are normalized where the original has norms."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any

    def __init__(self, original: Any, window: int | None = None) -> None:
        """Take the layers of transformers' module `original`; `window` is that of the block's attention."""
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.block, self.scale, self.window = original.layer_idx, original.scaling, window
        self.head_dim: int = getattr(original, "head_dim", None) or original.head_size
        self.has_norms = hasattr(original, "q_norm")

    def forward(self, hidden_states: Tensor, *, step: StepContext, **_: object) -> tuple[Tensor, None]:
        """Map `[1, num_tokens, hidden_size]` to the same shape, by the signature of transformers' module."""
        query, key, value = self.project(hidden_states)
        out = step.attend(self.block, query, key, value, scale=self.scale, window=self.window)
        return self.project_out(out.view(1, out.shape[0], -1)), None

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each `[num_tokens, heads, head_dim]`."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (layer(hidden).view(hidden.shape[1], -1, self.head_dim) for layer in layers)
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def project_out(self, rows: Tensor) -> Tensor:
        """Map `[1, num_tokens, num_heads * head_dim]` to hidden states."""
        out: Tensor = self.o_proj(rows)
        return out


class JoinedRotaryAttention(RotaryAttention):
    """One layer for all: queries of every head, then keys, then values."""

    qkv_proj: Any

    def __init__(self, original: Any, window: int | None = None) -> None:
        super().__init__(original, window)
        self.num_kv_heads: int = original.num_key_value_heads

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.qkv_proj(hidden).view(hidden.shape[1], -1, self.head_dim)
        num_heads = rows.shape[1] - 2 * self.num_kv_heads
        query, key, value = rows.split((num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return query, key, value


class InterleavedRotaryAttention(RotaryAttention):
    """One layer for all: query, key and value of a head, then those of the next."""

    query_key_value: Any
    dense: Any

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.query_key_value(hidden).view(hidden.shape[1], -1, 3 * self.head_dim)
        query, key, value = rows.split(self.head_dim, dim=2)
        return query, key, value

    def project_out(self, rows: Tensor) -> Tensor:
        out: Tensor = self.dense(rows)
        return out
