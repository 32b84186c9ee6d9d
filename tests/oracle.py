"""What APB means, as one mask over the whole sequence: the reference of every engine and rank count.

Nothing here is shared with the package but the layout's numbers (lengths, blocks, anchor) and the tokens that
were selected; the mask, the softmax and the order of rows are its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_apb.layout import Layout


@dataclass(frozen=True)
class Sequence:
    """One layer's rows over the whole prompt: [anchor copy (recomputed only) | context | question]."""

    q: torch.Tensor  # [num_rows, num_q_heads, head_dim]
    k: torch.Tensor  # [num_rows, num_kv_heads, head_dim]
    v: torch.Tensor


def num_copied(layout: Layout) -> int:
    return layout.anchor + layout.num_tokens - layout.context_end if layout.recomputed else 0


Chosen = dict[int, list[set[int]]]


def select(sequence: Sequence, layout: Layout, question_rows: slice, selector: str = "query") -> Chosen:
    """Per block the prompt tokens of earlier ones that it sees, a set for each KV head, by the plain formulas.

    query (Spava): mean over question tokens and grouped heads of q . k, max over 5 neighbours in the block.
    key_diff: minus the cosine of the key to the mean of the candidates' unit keys.
    """
    num_kv_heads = sequence.k.shape[1]
    kept: list[list[tuple[float, int]]] = [[] for _ in range(num_kv_heads)]  # score and token
    seen: Chosen = {}
    for block, span in enumerate(layout.blocks):
        if layout.max_passing is not None and block % 16 == 0:
            kept = [sorted(tokens, key=_worse)[: layout.max_passing] for tokens in kept]
        seen[block] = [{token for _, token in tokens} for tokens in kept]
        start = min(max(span.start, layout.anchor), span.end)
        for head, scores in enumerate(_scores(sequence, layout, start, span.end, question_rows, selector)):
            ranked = sorted(zip(scores, range(start, span.end), strict=True), key=_worse)
            kept[head] += ranked[: layout.passing]
    return seen


def _worse(score_and_token: tuple[float, int]) -> tuple[float, int]:
    """Smaller scores last, and later tokens last among equals."""
    score, token = score_and_token
    return -score, token


def _scores(
    sequence: Sequence, layout: Layout, start: int, end: int, question_rows: slice, selector: str
) -> list[list[float]]:
    """Of tokens [start, end), for each KV head."""
    copied, num_kv_heads = num_copied(layout), sequence.k.shape[1]
    group = sequence.q.shape[1] // num_kv_heads
    scores = []
    for head in range(num_kv_heads):
        keys = sequence.k[copied + start : copied + end, head].double()
        if selector == "key_diff":
            units = keys / keys.norm(dim=-1, keepdim=True)
            mean = units.sum(dim=0)
            scores.append((-(units @ mean) / mean.norm()).tolist())
            continue
        queries = sequence.q[question_rows, head * group : (head + 1) * group].double()
        raw = torch.einsum("qgd,nd->qgn", queries, keys).mean(dim=(0, 1)).tolist()
        scores.append([max(raw[max(i - 2, 0) : i + 3]) for i in range(len(raw))])
    return scores


def mask(layout: Layout, chosen: Chosen, num_kv_heads: int) -> torch.Tensor:
    """Which row sees which key: bool [num_kv_heads, num_rows, num_rows]."""
    copied = num_copied(layout)
    num_rows = copied + layout.num_tokens
    seen = torch.zeros(num_kv_heads, num_rows, num_rows, dtype=torch.bool)
    for row in range(copied):
        seen[:, row, : row + 1] = True
    for block, span in enumerate(layout.blocks):
        for token in range(span.start, span.end):
            row = copied + token
            if layout.recomputed:
                seen[:, row, :copied] = block > 0
            else:
                seen[:, row, : min(layout.anchor, span.start)] = True
            for head, tokens in enumerate(chosen[block]):
                seen[head, row, [copied + token for token in tokens]] = True
            seen[:, row, copied + span.start : row + 1] = True
    for token in range(layout.context_end, layout.num_tokens):
        seen[:, copied + token, copied : copied + token + 1] = True
    return seen


def attend(sequence: Sequence, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale q k^T + mask) v in float64, [num_rows, num_q_heads, head_dim]."""
    num_q_heads, num_kv_heads = sequence.q.shape[1], sequence.k.shape[1]
    out = torch.empty_like(sequence.q, dtype=torch.float64)
    for head in range(num_q_heads):
        kv_head = head // (num_q_heads // num_kv_heads)
        logits = scale * sequence.q[:, head].double() @ sequence.k[:, kv_head].double().T
        weights = logits.masked_fill(~seen[kv_head], -torch.inf).softmax(dim=-1)
        out[:, head] = weights @ sequence.v[:, kv_head].double()
    return out
