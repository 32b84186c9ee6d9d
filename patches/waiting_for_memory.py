"""Target: `DecodePreallocQueue._update_handshake_waiters`.

Reason: SGLang polls requests that wait for KV memory only if one of them has failed, which its ranks find out at
different times. All of them have to poll together: one that polls alone waits for ever.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from sglang_apb.patches._patch import Patch


def _poll_if_one_is_lost(self: Any, rids_to_check: Any, pp_good_rids: Any, pp_bad_rids: Any) -> None:
    """SGLang polls whenever a request is not known to be `waiting_for_input`, and finds out again that it is."""
    if not self.queue or not all(request.waiting_for_input for request in self.queue):
        return  # it does not poll on any rank, or on all
    is_lost = any(getattr(request.kv_receiver, "is_lost", False) for request in self.queue)
    if dist.get_world_size(self.gloo_group) > 1:
        on_any_rank = torch.tensor([int(is_lost)])
        dist.all_reduce(on_any_rank, dist.ReduceOp.MAX, group=self.gloo_group)
        is_lost = bool(on_any_rank)
    if is_lost:
        self.queue[0].waiting_for_input = False


PATCHES = (
    Patch(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue._update_handshake_waiters",
        "before",
        ("self", "rids_to_check", "pp_good_rids", "pp_bad_rids"),
        _poll_if_one_is_lost,
    ),
)
