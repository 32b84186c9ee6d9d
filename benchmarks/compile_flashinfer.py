"""Compiles the FlashInfer kernels that the GPU benchmarks use, on a machine that needs no GPU but nvcc.

    CUDA_HOME=... FLASHINFER_CUDA_ARCH_LIST=9.0a python benchmarks/compile_flashinfer.py OUT_DIR

FlashInfer compiles a kernel at its first use, for minutes; where it can be had, its package flashinfer-jit-cache spares
that. For GPU hosts without network: copy OUT_DIR's folders into `flashinfer/data/aot` there.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import torch
from flashinfer.jit.attention import gen_batch_prefill_module, gen_single_prefill_module

PLAIN = (0, False, False, False)  # no position encoding, sliding window, soft cap, float16 reduction
HEAD_DIMS = (128, 64)


def main() -> None:
    target = Path(sys.argv[1])
    types = (torch.bfloat16,) * 3
    for head_dim in HEAD_DIMS:
        heads = (head_dim, head_dim)
        for spec in (
            gen_batch_prefill_module("fa3", *types, torch.int32, *heads, *PLAIN),
            gen_single_prefill_module("fa3", *types, *heads, *PLAIN),
            gen_batch_prefill_module("fa2", *types, torch.int32, *heads, *PLAIN),  # SGLang's own, for exact prompts
        ):
            started = time.monotonic()
            spec.build(verbose=False)
            folder = target / spec.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(spec.jit_library_path, folder)
            print(f"{spec.name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
