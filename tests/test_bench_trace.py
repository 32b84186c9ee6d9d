"""What is read off a profiler's trace: invented traces, whose sums are known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import trace as bench_trace
from sglang_apb.commands.bench import ttft as bench_ttft


def event(category: str, name: str, start_ms: float, ms: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start_ms * 1e3, "dur": ms * 1e3}


# GPU:  |product 0-4|   |attention 5-9   |           |copy 12-13|
#               |nccl 3-7|              |nccl 9-11|
EVENTS = [
    event("kernel", "nvjet_sm90_tst_192x192", 0, 4),
    event("kernel", "void flashinfer::PrefillWithKVCacheKernel<...>", 5, 4),
    event("kernel", "ncclDevKernel_AllGather_RING_LL(...)", 3, 4),
    event("kernel", "ncclDevKernel_AllGather_RING_LL(...)", 9, 2),
    event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 12, 1),
    event("user_annotation", "sparse attention, layer 1", 20, 5),
    event("user_annotation", "sparse attention, layer 0", 0, 10),
    event("user_annotation", "sparse attention, layer 2", 30, 5),
    event("cuda_runtime", "cudaStreamSynchronize", 9, 1),  # in the first layer, which plans
    event("cuda_runtime", "cudaEventSynchronize", 40, 1),  # after the last
    event("cuda_runtime", "cudaLaunchKernel", 22, 1),
    {"ph": "M", "name": "process_name"},
]


def test_times_of_kernels_and_of_what_nothing_hides() -> None:
    summary = bench_trace.summarize(EVENTS)
    assert summary.num_layers == 3 and summary.waits == ()
    assert summary.span == pytest.approx(13e-3)
    assert summary.idle == pytest.approx(1e-3)  # 11-12
    assert summary.exposed == pytest.approx((1 + 2) * 1e-3)  # 4-5 and 9-11
    wanted = {"matrix products": 4, "attention": 4, "communication": 6, "copies": 1}
    assert summary.groups == {group: pytest.approx(ms * 1e-3) for group, ms in wanted.items()}


def test_kernels_that_run_beside_each_other_count_once() -> None:
    """0-10 | 1-2 within it | 5-11"""
    beside = [event("kernel", "nvjet", start, ms) for start, ms in ((0, 10), (1, 1), (5, 6))]
    summary = bench_trace.summarize([*beside, event("user_annotation", "sparse attention, layer 0", 0, 1)])
    assert summary.span == pytest.approx(11e-3) and summary.idle == pytest.approx(0)


@pytest.mark.parametrize(
    "name", ["cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"]
)
def test_a_host_that_waits_between_layers_is_seen(name: str) -> None:
    summary = bench_trace.summarize([*EVENTS, event("cuda_runtime", name, 22, 0.1)])
    assert [wait.name for wait in summary.waits] == [name]
    assert f"waits for the GPU: 1 ({name})" in bench_trace.describe([summary])
    assert "waits for the GPU: none" in bench_trace.describe([bench_trace.summarize(EVENTS)])


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void flashinfer::norm::FusedAddRMSNormKernel<8u>", "norms, RoPE, gate"),
        ("void (anonymous namespace)::store_kvcache<2048l>", "KV cache"),
        ("_merge_kernel", "merge"),
        ("_query_kernel", "scores, selection, packing"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "matrix products"),
        ("ncclDevKernel_Broadcast_RING_LL", "communication"),
        ("create_flashinfer_kv_indices_triton", "other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel: str, group: str) -> None:
    assert bench_trace.group_of(kernel) == group


def test_traces_of_ranks_stand_side_by_side(tmp_path: Path) -> None:
    folder = tmp_path / "600"
    folder.mkdir()
    for rank in range(2):
        with gzip.open(folder / f"1-TP-{rank}.trace.json.gz", "wt") as file:
            json.dump({"traceEvents": EVENTS}, file)
    said = bench_ttft.describe_traces(tmp_path, [600, 700])
    assert "rank 0" in said and "rank 1" in said and "| whole prefill" in said and "3.0 (23.1%)" in said
    assert said.endswith("no trace")


def test_a_trace_without_a_sparse_prefill_is_told() -> None:
    with pytest.raises(CommandError, match="shows no sparse prefill"):
        bench_trace.summarize([event("kernel", "nvjet", 0, 1)])
