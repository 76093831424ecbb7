"""Mixtral: Mistral's attention, and experts of which a router chooses a few per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralRMSNorm, MixtralRotaryEmbedding

from worker.architectures.base import Architecture
from worker.gated import multiply_gated
from worker.rotary_attention import RotaryAttention


class Expert(nn.Module):
    """One expert's linear layers, by the checkpoint's names."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)


class SparseExperts(nn.Module):
    """Routes each token to its `top_k` experts and computes only those.

    transformers keeps all experts of a block in two 3-D parameters; here each is linear layers like any other. A
    token's results are added in the order of its router's ranking, so they do not depend on its neighbours.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k: int = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.intermediate_size) for _ in range(config.num_local_experts)
        )
        self.act_fn = ACT2FN[config.hidden_act]
        self.arrivals: Callable[[Sequence[int]], Iterable[int]] = iter
        """Yields the experts that were chosen, each once its weights are in memory, in any order."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[1, num_tokens, hidden_size]` to the same shape."""
        rows = hidden[0]
        probabilities = torch.softmax(self.gate(rows).float(), dim=-1)
        weights, chosen = torch.topk(probabilities, self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        results = self._results(rows, chosen).view(rows.shape[0], self.top_k, -1)
        out = results[:, 0] * weights[:, :1]
        for rank in range(1, self.top_k):
            out += results[:, rank] * weights[:, rank : rank + 1]
        return out.to(hidden.dtype).unsqueeze(0)

    def _results(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """Return `[num_tokens * top_k, hidden_size]`: each token's chosen experts, by rank."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        places = torch.split(order, counts)
        results = rows.new_empty(order.shape[0], rows.shape[1])
        for number in self.arrivals([number for number, count in enumerate(counts) if count]):
            mine = places[number]
            results[mine] = self._compute(self.experts[number], rows[mine // self.top_k])
        return results

    def _compute(self, expert: Any, rows: Tensor) -> Tensor:
        out: Tensor = expert.w2(multiply_gated(self.act_fn, expert.w1(rows), expert.w3(rows)))
        return out


class Mixtral(Architecture):
    """See the module."""

    block_class = MixtralDecoderLayer
    norm_class = MixtralRMSNorm
    rotary_class = MixtralRotaryEmbedding
    shared_inputs = (*Architecture.shared_inputs, ("w1", "w3"))
    use_last = ("w2",)
    unquantized = ("mlp.gate",)  # the router
    experts_name = "mlp.experts"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_chosen_experts = config.num_experts_per_tok

    def adapt_block(self, block: Any) -> None:
        block.self_attn = RotaryAttention(block.self_attn, self.config.sliding_window)
        block.mlp = SparseExperts(self.config)

    def checkpoint_keys(self, key: str) -> tuple[str, ...]:
        return super().checkpoint_keys(key.replace(".mlp.", ".block_sparse_moe."))


ARCHITECTURE = Mixtral
