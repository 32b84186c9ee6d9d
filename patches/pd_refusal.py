"""Targets, with our transfer: `TokenizerManager.generate_request`, `Scheduler.abort_request`; on prefill servers also
`prefill.is_unadmitted_reject`, `PrefillBootstrapQueue.pop_bootstrapped`. Reason: SGLang's router asks both servers at
once, and waits for both. Of a prompt that one of them refuses, or never hears of, the other would wait in vain.

    refused at a door                   it tells the schedulers, on the way that aborts take, and they the other server
    refused in prefill's scheduler      it gets a sender all the same, which tells decode
    not heard of by prefill             the transfer counts its time while the scheduler takes them in (its endpoint)

SGLang's registry puts a hook wherever the function was imported, in decode's module too: a decode server must keep its
own. Official point tried: none is asked before the prompt is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from sglang_apb.patches import door, insides
from sglang_apb.patches._patch import Patch

logger = logging.getLogger(__name__)


def _refuse_later(original: Any, req: Any) -> bool:
    return False if insides.has_decode_server(req) else original(req)


async def _tell_schedulers(original: Any, self: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
    try:
        async for out in original(self, obj, request):
            yield out
    except ValueError as error:  # which SGLang answers with HTTP 400
        door.refuse_rooms(self, obj, str(error))
        raise


def _tell_other_server(original: Any, self: Any, recv_req: Any) -> Any:
    refused = door.refused_room(recv_req)
    if refused is None:
        return original(self, recv_req)
    try:
        if insides.pair_half() == "prefill":
            insides.sending_of(insides.bootstrap_queue_of(self)).refuse(refused.number, refused.reason)
        else:
            address = insides.bootstrap_address(refused.host, refused.port)
            insides.decode_transfer_of(self).refuse_room(address, refused.number, refused.reason)
    except Exception:  # what clients write there must not end the scheduler; the other server gives up by itself
        logger.exception("room %r, which was refused, could not be told to the other server", refused)
    return None


def _pass(self: Any) -> None:
    """What has come to this rank until now has a sender."""
    insides.sending_of(self).pass_scheduler()


_QUEUE = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue"
PATCHES = (
    Patch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        ("self", "obj", "request"),
        _tell_schedulers,
    ),
    Patch("sglang.srt.managers.scheduler.Scheduler.abort_request", "around", ("self", "recv_req"), _tell_other_server),
)
PREFILL_PATCHES = (
    Patch("sglang.srt.disaggregation.prefill.is_unadmitted_reject", "around", ("req",), _refuse_later),
    Patch(f"{_QUEUE}.pop_bootstrapped", "before", ("self",), _pass),
)
