"""Targets: `PrefillBootstrapQueue.create_sender`, `DecodePreallocQueue._create_receiver_and_enqueue`. Reason: both
servers know a request by its bootstrap room alone. Two requests of one room, which clients and routers choose, must not
get each other's KV: both sides say which prompt theirs is. Official point tried: SGLang's KV senders and receivers are
told pages, not requests.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches import insides
from sglang_apb.patches._patch import Patch


def _tell_sender(result: bool, self: Any, req: Any, num_kv_heads: int) -> None:
    _tell(insides.sender_of(req), req)


def _tell_receiver(result: Any, self: Any, req: Any, is_rebootstrap: bool = False) -> None:
    if not is_rebootstrap:  # else what was generated is part of prefill's prompt
        _tell(insides.receiver_of(result), req)


def _tell(end: Any, req: Any) -> None:
    if end is not None and not insides.is_ended(req):
        end.set_prompt(insides.prompt_ids(req))


PATCHES = (
    Patch(
        "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.create_sender",
        "after",
        ("self", "req", "num_kv_heads"),
        _tell_sender,
    ),
    Patch(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue._create_receiver_and_enqueue",
        "after",
        ("self", "req", "is_rebootstrap"),
        _tell_receiver,
    ),
)
