"""Targets, on the portable CPU platform only:

- `GroupCoordinator.__init__`: with more than one rank it opens pynccl, which needs a GPU.
- `Scheduler.on_idle`: a scheduler that waits for KV polls without a pause, on a core that the prefill needs.

Official points tried: the platform says which device a group is on, not which communicators; `sleep_on_idle` is for a
scheduler that has nothing to wait for.
"""

from __future__ import annotations

import time
from typing import Any

from sglang_apb.patches._patch import Patch

_PARAMETERS = (
    "self",
    "group_ranks",
    "local_rank",
    "torch_distributed_backend",
    "use_pynccl",
    "use_mscclpp",
    "use_custom_allreduce",
    "use_torch_symm_mem_all_reduce",
    "use_hpu_communicator",
    "use_xpu_communicator",
    "use_message_queue_broadcaster",
    "group_name",
    "gloo_timeout",
    "recovered_rank",
    "rank_offset",
    "max_world_size",
)
_GPU_COMMUNICATORS = frozenset(
    name for name in _PARAMETERS if name.startswith("use_") and name != "use_message_queue_broadcaster"
)
# A wait of this long is lost in what a CPU takes for one token.
_POLL_INTERVAL_S = 0.01


def _without_gpu_communicators(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
    coordinator = named.pop("self")
    return (coordinator,), named | dict.fromkeys(_GPU_COMMUNICATORS, False)


def _pause(result: None, scheduler: Any) -> None:
    if not scheduler.is_fully_idle():  # when it is, SGLang has just slept until something came
        time.sleep(_POLL_INTERVAL_S)


PATCHES = (
    Patch(
        target="sglang.srt.distributed.parallel_state.GroupCoordinator.__init__",
        kind="before",
        parameters=_PARAMETERS,
        hook=_without_gpu_communicators,
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.on_idle",
        kind="after",
        parameters=("self",),
        hook=_pause,
    ),
)
