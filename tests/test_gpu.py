"""The same oracle on GPUs: every kernel that the SDPA engine calls, and ranks joined by NCCL."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from test_sparse_attention import CONFIGS, TOLERANCE, errors_on_rank

from sglang_apb.attention.base import Segment
from sglang_apb.attention.sdpa import SdpaEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# ||found - wanted|| / ||wanted||: what rounding of inputs and products leaves of each precision.
PRECISION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(9, 3), (32, 8), (4, 4)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_engine_gives_attention_and_its_lse(
    dtype: torch.dtype, num_q_heads: int, num_kv_heads: int, causal: bool, head_dim: int
) -> None:
    num_queries, num_keys = (301, 301) if causal else (300, 517)
    q = torch.randn(num_queries, num_q_heads, head_dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(num_keys, num_kv_heads, head_dim, device="cuda", dtype=dtype) for _ in range(2))
    scale = head_dim**-0.5
    (found,) = SdpaEngine().attend([Segment(q, k, v, causal)], scale)
    keys, values = (x.double().repeat_interleave(num_q_heads // num_kv_heads, dim=1) for x in (k, v))
    logits = scale * torch.einsum("qhd,khd->hqk", q.double(), keys)
    if causal:
        logits.masked_fill_(torch.ones(num_queries, num_keys, dtype=torch.bool, device="cuda").triu(1), -torch.inf)
    wanted = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values)
    assert relative_error(found.out, wanted) < PRECISION[dtype]
    assert relative_error(found.lse, logits.logsumexp(-1).T) < PRECISION[dtype]


def test_one_rank_equals_the_oracle() -> None:
    for name, error in errors_on_rank(None, 1, "cuda").items():
        assert error < TOLERANCE, name


def _errors_on_own_gpu(group: object, num_ranks: int) -> dict[str, float]:
    return errors_on_rank(group, num_ranks, "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_over_nccl_equal_the_oracle() -> None:
    for rank, errors in enumerate(run_ranks(2, _errors_on_own_gpu, 2, device="cuda")):
        assert errors.keys() == CONFIGS.keys()
        for name, error in errors.items():
            assert error < TOLERANCE, f"rank {rank}, {name}"
