"""Log probabilities of chosen and best tokens, from logits as the model gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.request import TokenLogprobs
from worker.drawing import log_normalizers


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_best: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    """Return the log probability of each row's token and of its `num_best` best; `logits` is `[num_rows, vocab_size]`.

    Equally likely tokens are ordered by id, lowest first.
    """
    normalizers = log_normalizers(logits)
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    logprobs = (logits.gather(1, chosen)[:, 0].double() - normalizers).tolist()
    best = [_best(row, count) for row, count in zip(logits, num_best, strict=True)]
    return tuple(
        TokenLogprobs(token_id, logprob, tuple(ids.tolist()), tuple((values.double() - normalizer).tolist()))
        for token_id, logprob, (ids, values), normalizer in zip(token_ids, logprobs, best, normalizers, strict=True)
    )


def _best(row: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count == 0:
        return row.new_empty(0, dtype=torch.int64), row[:0]
    lowest = row.topk(min(count, len(row))).values[-1]
    ids = (row >= lowest).nonzero()[:, 0]  # in vocabulary order, ties of the last one included
    values, order = row[ids].sort(descending=True, stable=True)
    return ids[order[:count]], values[:count]
