"""GPT-2: learned positions, projections stored transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from worker.architectures.base import Architecture


class PositionedEmbedding(nn.Module):
    """Adds a learned row per position."""

    def __init__(self, num_positions: int, hidden_size: int) -> None:
        super().__init__()
        self.wpe = nn.Embedding(num_positions, hidden_size)

    def forward(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Map embedding rows `[num_tokens, hidden_size]` to hidden states of the same shape."""
        out: Tensor = rows + self.wpe(positions)
        return out


class GPT2(Architecture):
    """See the module."""

    block_class = GPT2Block
    norm_epsilon = "layer_norm_epsilon"
    activation = "mlp.act"
    prefix = "transformer."
    blocks_key = "h."
    embedding_key = "wte.weight"
    norm_key = "ln_f."

    def adapt_block(self, block: Any) -> None:
        if isinstance(block.mlp.act, NewGELUActivation):
            block.mlp.act = nn.GELU(approximate="tanh")  # the same function in one pass over memory

    def make_embedding(self) -> nn.Module:
        return PositionedEmbedding(self.config.max_position_embeddings, self.hidden_size)


ARCHITECTURE = GPT2
