"""Targets: `KVCacheConfigurator._profile_available_bytes`, `TpModelWorker.get_worker_info`.

Reason: SGLang leaves a GPU's memory for one chunk's activations beside the KV pool, and lets prompts in as long as the
pool is large. A sparse prompt takes more, in rounds and all the more in one piece: what it takes is shared out together
with the KV that it leaves, unless `--mem-fraction-static` says how much the pool gets; and prompts that do not fit are
refused by their length. What sparse attention takes for itself is taken, and what it runs built, before that is worked
out, and so before the server says that it is ready. Official point tried: SGLang's own reserve for activations
(`--mem-fraction-static`, `--chunked-prefill-size`) knows one chunk, not a prompt.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
import torch.distributed as dist
from sglang_apb.patches import insides
from sglang_apb.patches._patch import Patch
from sglang_apb.patches.prefill_forward import backend_of, replicates_kv
from sglang_apb.patches.row_chunks import CHUNK_ROWS

from sglang_apb import backends, capacity, config
from sglang_apb.backends.activations import RowSizes
from sglang_apb.capacity import Space

logger = logging.getLogger(__name__)


def _leave_space(available_bytes: int, configurator: Any, pre_model_load_memory: float) -> int:
    """A smaller pool where activations need the space. Free memory is asked for as SGLang does, on all ranks."""
    from sglang.srt.utils import get_available_gpu_memory

    server_args = configurator.server_args
    if configurator.device != "cuda" or insides.is_pool_size_given(server_args):
        return available_bytes
    world = insides.world()
    free_gib = get_available_gpu_memory(
        configurator.device, configurator.gpu_id, distributed=world.world_size > 1, cpu_group=world.cpu_group
    )
    free_bytes = int(free_gib * (1 << 30))
    model, options = configurator.model_config, insides.options_of(server_args)
    kv = RowSizes.of(model).kv_bytes_per_token(model.num_hidden_layers)
    taken = _fixed_bytes(model) + _table_bytes(configurator, free_bytes // kv) + capacity.STARTING_BYTES
    replicate, settings = replicates_kv(server_args), config.parse(options.config_text)
    of_prompt = backends.load(options.backend).activations(
        model, settings, options.sp_size, configurator.page_size, replicate
    )
    parts = 1 if replicate else options.sp_size  # a pool takes prompts of so many times its tokens

    def of_longest(num_tokens: int) -> int:
        return of_prompt(min(parts * num_tokens, model.context_len))

    return min(available_bytes, capacity.pool_bytes(free_bytes - taken, kv, of_longest))


def _fixed_bytes(model_config: Any) -> int:
    """Whatever the prompt; feed-forward layers take at most one and a half times the rows of a chunk at once."""
    return capacity.FIXED_BYTES + RowSizes.of(model_config).feed_forward_bytes(CHUNK_ROWS * 3 // 2)


def _table_bytes(configurator: Any, num_tokens: int) -> int:
    """SGLang's table of requests and their slots, made beside the pool: 8.6 GB for 2,048 requests of 1M tokens."""
    num_requests = configurator.resolve_max_num_reqs(num_tokens)
    return num_requests * configurator.model_config.context_len * torch.int32.itemsize


def _with_limit(info: tuple[Any, ...], worker: Any) -> tuple[Any, ...]:
    """`max_req_len` and `max_req_input_len` (a prompt must be shorter), which SGLang takes from one rank's pool."""
    runner = worker.model_runner
    backend = backend_of(runner)
    _warm_up(runner)
    runner.activation_space = _activation_bytes(runner)
    space = Space(runner.max_total_num_tokens, runner.page_size, activation_space(runner))
    largest = capacity.largest_prompt(backend, space)
    longest = worker.model_config.context_len - 1
    max_req_len = min(longest if backend.keeps_parts else info[4], largest + 6)
    if insides.is_first_rank():
        logger.info("Prompts of up to %d tokens fit%s.", min(largest, max_req_len - 6), _why(backend, space, largest))
    return (*info[:4], max_req_len, max_req_len - 5, *info[6:])


def activation_space(runner: Any) -> int | None:
    """Bytes that a prompt's rows may take on any rank, as it was when the server started; None on a CPU."""
    return getattr(runner, "activation_space", None)


def _warm_up(runner: Any) -> None:
    """Before free memory is asked for, of which it takes some."""
    if runner.device != "cuda":
        return
    started, builds = time.perf_counter(), backend_of(runner).builds()
    for number, build in enumerate(builds, 1):
        if insides.is_first_rank():
            logger.info("Building sparse attention, %d of %d: %s.", number, len(builds), build.name)
        build.run()
        torch.cuda.synchronize()
    if insides.is_first_rank():
        logger.info("Sparse attention is ready: %.1f s.", time.perf_counter() - started)


def _why(backend: Any, space: Space, largest: int) -> str:
    in_slots = capacity.largest_prompt(backend, Space(space.num_slots, space.page_size))
    kept = "each rank keeps the KV it owns" if backend.keeps_parts else "each rank keeps all KV"
    return f" ({kept}: slots for {in_slots}{'' if largest == in_slots else ', activations for fewer'})"


def _activation_bytes(runner: Any) -> int | None:
    """Of the rank that has least, on every rank; None on a CPU."""
    if runner.device != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(runner.gpu_id)
    unused = torch.cuda.memory_reserved(runner.gpu_id) - torch.cuda.memory_allocated(runner.gpu_id)
    least = torch.tensor(free + unused - _fixed_bytes(runner.model_config))
    if insides.options_of(runner.server_args).sp_size > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN, group=insides.world().cpu_group)
    return max(int(least), 0)


PATCHES = (
    Patch(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
        "after",
        ("self", "pre_model_load_memory"),
        _leave_space,
    ),
    Patch("sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info", "after", ("self",), _with_limit),
)
