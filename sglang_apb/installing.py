"""What each option adds: a table of contents of `patches/`.

`install` is called once the server's arguments are known, in the parent and in every rank process.
`patches/last_layer.py` hooks a module of the loaded model, not a function; `patches/prefill_forward.py` installs it
with the prefill backend.
"""

from __future__ import annotations

import multiprocessing
from typing import Any


def install(server_args: Any) -> None:
    """Applies the patches that `server_args` asks for. Raises PatchError when SGLang is not the known one."""
    from sglang_apb.patches import _patch

    _patch.apply(_wanted_patches(server_args))


def _wanted_patches(server_args: Any) -> list[Any]:
    from sglang_apb.patches import (
        answer_metadata,
        body_errors,
        context_cache,
        host_watch,
        insides,
        kv_ownership,
        model_parallel,
        pd_decode,
        pd_prefill,
        pd_prompt,
        pd_refusal,
        portable_cpu,
        prefill_forward,
        prompt_memory,
        request_checks,
        rounds,
        row_chunks,
        scheduling,
        transfer_backend,
    )
    from sglang_apb.platform import is_portable_cpu
    from sglang_apb.transfer.protocol import keys as transfer_keys

    options, server_args = insides.options_of(server_args), insides.resolved(server_args)
    our_transfer = server_args.disaggregation_transfer_backend == transfer_backend.BACKEND
    wanted: list[Any] = []
    if is_portable_cpu():
        wanted += portable_cpu.PATCHES
    if options.is_set:
        context_cache.register()
        wanted += (*scheduling.PATCHES, *rounds.PATCHES, *prefill_forward.PATCHES)
        wanted += (*prompt_memory.PATCHES, *row_chunks.PATCHES)
    if options.sp_size > 1:
        wanted += model_parallel.PATCHES
        if server_args.nnodes > 1:
            wanted += host_watch.PATCHES
    if our_transfer:
        wanted += (*transfer_backend.PATCHES, *pd_prompt.PATCHES, *pd_refusal.PATCHES)
        if server_args.disaggregation_mode == "prefill":
            wanted += pd_refusal.PREFILL_PATCHES
        keys = transfer_keys.load(options.transfer())
        transfer_backend.use_key(keys.public if keys else "")
    if options.is_set and server_args.disaggregation_mode == "prefill":
        wanted += pd_prefill.PATCHES
        if our_transfer and options.sp_size > 1:
            wanted += kv_ownership.PATCHES
    if our_transfer and server_args.disaggregation_mode == "decode":
        wanted += pd_decode.PATCHES
    if options.is_set or our_transfer:
        wanted += (*request_checks.PATCHES, *answer_metadata.PATCHES)
        if multiprocessing.parent_process() is None:  # ranks answer no HTTP
            wanted += body_errors.PATCHES
    return wanted
