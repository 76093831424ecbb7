"""A real chat model through three stages, from messages to text, against transformers on the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coordinator.detokenizer import Detokenizer
from coordinator.stop_strings import StopStrings
from coordinator.tokenizer import Tokenizer
from tests.worker.pipeline_driver import PipelineDriver, load_span, make_order, recorded_logits
from tests.worker.references import generate, load_reference

VOCAB_SIZE = 49_152
MAX_TOKENS = 16
PAGES = {"num_pages": 12, "page_size": 64}
CHATS = (
    [("user", "What is the capital of France?")],
    [("system", "Answer in one word."), ("user", "Name an animal 🐍."), ("assistant", "Cat."), ("user", "Another?")],
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("gguf", reason="makes the checkpoint; see tests/fetch_smollm2.py")
    from tests.fetch_smollm2 import fetch

    return fetch()


@pytest.fixture(scope="module")
def pipeline(smollm2: Path) -> PipelineDriver:
    orders = [make_order(smollm2, stage, 3, **PAGES) for stage in range(3)]
    return PipelineDriver([load_span(order).executor for order in orders], **PAGES)


@pytest.mark.timeout(300)
def test_chat_gives_the_tokens_logits_and_text_of_transformers(smollm2: Path, pipeline: PipelineDriver) -> None:
    tokenizer = Tokenizer(smollm2, VOCAB_SIZE)
    reference = load_reference(smollm2)
    for chat in CHATS:
        prompt, text = tokenizer.encode_chat(chat, max_tokens=512)
        assert text.endswith("<|im_start|>assistant\n")
        expected = generate(reference, prompt, MAX_TOKENS)
        with recorded_logits() as recorded:
            token_ids = pipeline.generate(prompt, MAX_TOKENS, chunk=16)
        assert token_ids == expected.token_ids
        torch.testing.assert_close(torch.cat(recorded), expected.logits, atol=1e-3, rtol=0)
        detokenizer = Detokenizer(tokenizer, prompt)
        pieces = [detokenizer.push([token_id]) for token_id in token_ids]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(token_ids)


def test_completion_ends_before_a_stop_string_across_tokens(smollm2: Path, pipeline: PipelineDriver) -> None:
    tokenizer = Tokenizer(smollm2, VOCAB_SIZE)
    prompt = tokenizer.encode("The capital of France is", max_tokens=512)
    token_ids = pipeline.generate(prompt, MAX_TOKENS)
    detokenizer, stop_strings = Detokenizer(tokenizer, prompt), StopStrings(["ris."])
    text = "".join(stop_strings.push(detokenizer.push([token_id])) for token_id in token_ids)
    assert (text, stop_strings.matched) == (" Pa", "ris.")
