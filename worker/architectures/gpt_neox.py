"""GPT-NeoX and Pythia: parallel residuals, a rotary embedding on part of each head."""

from __future__ import annotations

from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding

from worker.architectures.base import HEAD_KEY, Architecture


class GPTNeoX(Architecture):
    """See the module. Its checkpoints name the head `embed_out`."""

    block_class = GPTNeoXLayer
    norm_epsilon = "layer_norm_eps"
    rotary_class = GPTNeoXRotaryEmbedding
    activation = "mlp.act"
    prefix = "gpt_neox."
    embedding_key = "embed_in.weight"
    norm_key = "final_layer_norm."

    def checkpoint_keys(self, key: str) -> tuple[str, ...]:
        keys = super().checkpoint_keys(key)
        return ("embed_out.weight", *keys) if HEAD_KEY + "weight" in keys else keys


ARCHITECTURE = GPTNeoX
