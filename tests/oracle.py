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


def select(
    sequence: Sequence, layout: Layout, question_rows: slice, selector: str = "query"
) -> dict[int, torch.Tensor]:
    """Per block the prompt tokens that it hands on, [num_passing, num_kv_heads], by the plain formulas.

    query (Spava): mean over question tokens and grouped heads of q . k, max over 5 neighbours in the block.
    key_diff: minus the cosine of the key to the mean of the candidates' unit keys.
    """
    copied = num_copied(layout)
    num_kv_heads = sequence.k.shape[1]
    chosen = {}
    for block, span in enumerate(layout.blocks[:-1]):
        start = min(max(span.start, layout.anchor), span.end)
        num_candidates = span.end - start
        scores = torch.empty(num_candidates, num_kv_heads)
        for head in range(num_kv_heads):
            group = sequence.q.shape[1] // num_kv_heads
            queries = sequence.q[question_rows, head * group : (head + 1) * group].double()
            keys = sequence.k[copied + start : copied + span.end, head].double()
            if selector == "key_diff":
                units = keys / keys.norm(dim=-1, keepdim=True)
                mean = units.mean(dim=0)
                scores[:, head] = -(units @ mean) / mean.norm()
                continue
            raw = torch.einsum("qgd,nd->qgn", queries, keys).mean(dim=(0, 1))
            for token in range(num_candidates):
                scores[token, head] = raw[max(token - 2, 0) : token + 3].max()
        best = scores.argsort(dim=0, descending=True, stable=True)
        chosen[block] = start + best[: min(layout.passing, num_candidates)]
    return chosen


def mask(layout: Layout, chosen: dict[int, torch.Tensor], num_kv_heads: int) -> torch.Tensor:
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
            for earlier in range(block):
                for head in range(num_kv_heads):
                    seen[head, row, copied + chosen[earlier][:, head]] = True
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
