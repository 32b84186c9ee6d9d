"""Target: `DecodeTransferQueue._commit_transfer_to_req`. Reason: the decode server's answer says how the prefill
server ran the prompt, how many bytes of KV came, and how many of them while the prefill still ran. Official point
tried: what SGLang carries beside KV (its aux buffers) has a fixed layout.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sglang_apb.patches import insides
from sglang_apb.patches._patch import Patch


def _keep_report(self: Any, decode_req: Any) -> None:
    """Before, because SGLang drops the receiver once the transfer is committed."""
    receiver = decode_req.kv_receiver
    info = getattr(receiver, "prefill_info", None)
    if isinstance(info, dict) and info:
        num_ranks = receiver.kv_mgr.attn_tp_size  # each of them gets as many bytes: of its own heads
        report = info | {
            "kv_bytes": num_ranks * receiver.num_bytes,
            "kv_bytes_hidden": num_ranks * receiver.num_hidden_bytes,
            "kv_data_plane": receiver.data_plane,
        }
        with suppress(KeyError, ValueError):  # a text on the wire, of whatever server
            report["attention_share"] = float(report["attention_share"])
        insides.tell_client(decode_req.req, report)


PATCHES = (
    Patch(
        "sglang.srt.disaggregation.decode.DecodeTransferQueue._commit_transfer_to_req",
        "before",
        ("self", "decode_req"),
        _keep_report,
    ),
)
