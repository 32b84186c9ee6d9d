"""Serving on a CPU without AMX, with PyTorch's own operators.

SGLang's CPU engine needs AMX instructions. As an out-of-tree platform, SGLang asks this class for every part
that would otherwise be chosen by hardware.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

logger = logging.getLogger(__name__)

# When the user names no sizes. SGLang takes whatever other processes use for the weights' share, and refuses to
# start where that leaves no KV: ranks and servers that start side by side must not do that to each other. So the
# share is generous, and the KV pool, which is written once at start (32K tokens: 2 s), is bounded by tokens.
DEFAULT_MEM_FRACTION = 0.9
DEFAULT_MAX_TOTAL_TOKENS = 32768


class PortableCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Out-of-tree platform for `--device cpu` on any x86 or Arm machine."""

    _enum = PlatformEnum.OOT

    def get_device(self, local_rank: int = 0) -> str:  # type: ignore[override]
        # ServerArgs.device must be a string; all ranks share the one CPU device.
        return "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fills in what a CPU server needs and the user left out."""
        if server_args.attention_backend == "intel_amx":  # SGLang's CPU default, set just before this call
            server_args.attention_backend = "torch_native"
        if server_args.dtype == "auto" and not has_bfloat16():
            logger.warning("This CPU computes bfloat16 in software: --dtype float32 is used, give --dtype to choose.")
            server_args.dtype = "float32"
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = DEFAULT_MEM_FRACTION
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_MAX_TOTAL_TOKENS
        # A scheduler that polls without a pause takes a whole core from the forward passes.
        server_args.sleep_on_idle = True
        # A prefill server sends a cached prefix ahead of its batch by way of a CUDA event.
        os.environ.setdefault("SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX", "0")
        # A decode server keeps retracted KV in host memory that it registers with CUDA.
        if server_args.disaggregation_decode_retraction_backup is None:
            server_args.disaggregation_decode_retraction_backup = "cpu_tensor"
        _share_cores(server_args.tp_size)

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices. Without it they take 8 times as long as float32 ones."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _share_cores(num_ranks: int) -> None:
    """Gives each rank an equal share of this process's cores, through variables the rank processes inherit.

    OMP_NUM_THREADS is read when a rank starts; SGLang refuses more ranks than NUMA nodes unless
    SGLANG_CPU_OMP_THREADS_BIND names one core set a rank.
    """
    cores = sorted(os.sched_getaffinity(0))
    per_rank = max(1, len(cores) // num_ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(per_rank))
    # Threads that wait for each other by spinning starve when prefill and decode servers share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    shares = [cores[rank * per_rank % len(cores) :][:per_rank] for rank in range(num_ranks)]
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, share)) for share in shares))
