"""llama.cpp with Q8_0 weights through llama-cpp-python's low-level interface: sequences decode in one batch.

Covers Llama's architecture only; the GGUF file has no tokenizer, since workloads are token ids.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from measures import Round, Workload
from peers.process import Limits, Run, main

FILE = "model.gguf"
BATCH_TOKENS = 512
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def prepare(checkpoint: Path, folder: Path) -> None:
    """Write the GGUF file: matrices as Q8_0, norms as fp32."""
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // num_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                values = opened.get_tensor(name).float().numpy()
                if values.ndim == 1:
                    writer.add_tensor(gguf_name(name), values)
                    continue
                heads = {"q_proj.weight": num_heads, "k_proj.weight": num_kv_heads}
                rotated = next((count for end, count in heads.items() if name.endswith(end)), None)
                codes = gguf.quants.quantize(interleave(values, rotated), gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(gguf_name(name), codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, _, block, kind = stem.split(".", 3)
    return f"blk.{block}.{NAMES[kind]}.weight"


def interleave(weight: np.ndarray[Any, Any], num_heads: int | None) -> np.ndarray[Any, Any]:
    """Bring rows of query and key projections from transformers' order (halves) into GGUF's (pairs)."""
    if num_heads is None:
        return weight
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


@dataclass(slots=True)
class Context:
    """A loaded model, called with batches of (sequence, position, token, whether a token is sampled)."""

    library: Any
    handle: Any
    batch: Any
    vocab_size: int

    def clear(self) -> None:
        """Forget every sequence."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.handle), True)

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Compute a batch; return the greedy token of each row that asks for one."""
        self.batch.n_tokens = len(rows)
        for index, (sequence, position, token_id, is_sampled) in enumerate(rows):
            self.batch.token[index] = token_id
            self.batch.pos[index] = position
            self.batch.n_seq_id[index] = 1
            self.batch.seq_id[index][0] = sequence
            self.batch.logits[index] = is_sampled
        if self.library.llama_decode(self.handle, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [self._best(index) for index, row in enumerate(rows) if row[3]]

    def _best(self, index: int) -> int:
        logits = self.library.llama_get_logits_ith(self.handle, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())


def load(folder: Path, limits: Limits) -> tuple[Mapping[str, Any], Run]:
    """Load with llama.cpp's defaults for everything but sizes and threads."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(folder / FILE).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = limits.max_concurrency * limits.max_context
    params.n_batch = BATCH_TOKENS
    params.n_seq_max = limits.max_concurrency
    params.n_threads = params.n_threads_batch = limits.num_threads
    handle = llama_cpp.llama_init_from_model(model, params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(max(BATCH_TOKENS, limits.max_concurrency), 0, 1)
    context = Context(llama_cpp, handle, batch, vocab_size)
    about = {"system": "llama.cpp, Q8_0", "version": f"llama-cpp-python {llama_cpp.__version__}", "license": "MIT"}
    return about, lambda workload: generate(context, workload)


def generate(context: Context, workload: Workload) -> Round:
    """Compute all prompts in full batches, then one token of every sequence at a time."""
    context.clear()
    prompts = workload.prompts()
    last = workload.num_input_tokens - 1
    rows = [
        (sequence, position, token_id, position == last)
        for sequence, prompt in enumerate(prompts)
        for position, token_id in enumerate(prompt)
    ]
    begin = time.perf_counter()
    tokens: list[int] = []
    for start in range(0, len(rows), BATCH_TOKENS):
        tokens += context.decode(rows[start : start + BATCH_TOKENS])
    for position in range(workload.num_input_tokens, workload.num_input_tokens + workload.num_output_tokens - 1):
        tokens = context.decode([(sequence, position, token_id, True) for sequence, token_id in enumerate(tokens)])
    return Round(time.perf_counter() - begin, workload.num_tokens, [], [])


if __name__ == "__main__":
    main(__doc__, prepare, load)
