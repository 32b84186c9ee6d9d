"""What runs "these queries against these keys": one interface, so that engines can be exchanged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_apb.kernels import Kernels
from sglang_apb.layout import Span


@dataclass(frozen=True)
class Piece:
    """The next `num_queries` rows of q attend to rows `keys` of k and v.

    `causal`: query i sees the first i + 1 of them, and there are as many as queries; otherwise each sees them all.
    """

    num_queries: int
    keys: Span
    causal: bool = False

    def __post_init__(self) -> None:
        if self.causal and self.num_queries != len(self.keys):
            raise ValueError(
                f"a causal piece needs as many queries as keys, not {self.num_queries} and {len(self.keys)}: "
                "which keys a row sees would depend on the engine's convention"
            )


@dataclass(frozen=True)
class Partial:
    """Attention over some of a row's keys: to be merged with that over the others."""

    out: torch.Tensor  # [num_queries, num_q_heads, head_dim]
    # [num_queries, num_q_heads], float32: log2 of the sum of exponentials, as FlashInfer has it
    # (include/flashinfer/attention/state.cuh) and as merging wants it; -inf where a row saw no key.
    lse: torch.Tensor


class Attention(Protocol):
    """Attention of a call's queries over the keys of their pieces, planned before."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor | None = None
    ) -> Partial:
        """softmax(scale * q k^T) v over each row's keys, in `out` if given: contiguous, of q's shape and dtype.

        q: [num_queries, num_q_heads, head_dim]; k, v: [num_keys, num_kv_heads, head_dim]. Query head h uses KV head
        h // (num_q_heads / num_kv_heads). All on one device and in one dtype, any strides but a contiguous last
        dimension.
        """


@dataclass(frozen=True)
class Build:
    """A call whose first time compiles; `name` says to the user what."""

    name: str
    run: Callable[[], object]


class AttentionEngine(ABC):
    """Plans a prompt's attention once; every layer then runs the plans.

    `kernels` are what goes with the engine beside attention: scores, selection, packing, merging.
    """

    kernels: Kernels

    @abstractmethod
    def plan(self, calls: Sequence[Sequence[Piece]]) -> list[Attention]:
        """One Attention for each call's pieces, for one prompt: the plans of the prompt before end here.

        A call's pieces are causal ones whose keys follow each other, as their queries do, or none of them is causal.
        """

    def builds(
        self, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> Iterable[Build]:
        """What has to run once, so that no prompt waits for a compiler."""
        return ()
