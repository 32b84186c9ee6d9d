"""What runs "these queries against these keys": one interface, so that engines can be exchanged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """Queries and the keys that they attend to. All three on one device, in one dtype.

    `causal`: query i sees keys 0..i, and there are as many queries as keys; otherwise it sees all keys.
    """

    q: torch.Tensor  # [num_queries, num_q_heads, head_dim]
    k: torch.Tensor  # [num_keys, num_kv_heads, head_dim]; query head h uses KV head h // (num_q_heads / num_kv_heads)
    v: torch.Tensor  # [num_keys, num_kv_heads, head_dim]
    causal: bool = False

    def __post_init__(self) -> None:
        if self.causal and self.q.shape[0] != self.k.shape[0]:
            raise ValueError(
                f"a causal segment needs as many queries as keys, not {self.q.shape[0]} and {self.k.shape[0]}: "
                "which keys a row sees would depend on the engine's convention"
            )


@dataclass(frozen=True)
class Partial:
    """Attention over some of a row's keys: to be merged with that over the others."""

    out: torch.Tensor  # [num_queries, num_q_heads, head_dim]
    lse: torch.Tensor  # [num_queries, num_q_heads], float32, natural log; -inf where a row saw no key


class AttentionEngine(ABC):
    """Attends many segments at a time, which lets an engine put them into one kernel call."""

    @abstractmethod
    def attend(self, segments: Sequence[Segment], scale: float) -> list[Partial]:
        """One Partial a segment: softmax(scale * q k^T) v over the segment's keys, and its log-sum-exp."""


def merge(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of the partials' keys, which must not overlap. `out` keeps its dtype.

    softmax over a union is the average of the parts' outputs with weights exp(lse); the maximum is taken out
    first, so that no exponential overflows. A partial without keys (lse = -inf) has weight 0; a row without
    any key at all comes out as 0 with lse = -inf.
    """
    if len(partials) == 1:
        return partials[0]
    lse = torch.stack([partial.lse for partial in partials])  # [num_partials, num_queries, num_q_heads]
    total = torch.logsumexp(lse, dim=0)
    weights = torch.exp(lse - total.nan_to_num(neginf=0.0))
    out = torch.zeros_like(partials[0].out, dtype=torch.float32)
    for partial, weight in zip(partials, weights, strict=True):
        out += weight[..., None] * partial.out
    return Partial(out.to(partials[0].out.dtype), total)
