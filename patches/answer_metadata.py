"""Targets: `TokenizerManager.generate_request`, `OpenAIServingChat` and `OpenAIServingCompletion`'s response
builders and streams. Reason: the answer says how its prompt was prefilled.

    /generate         meta_info["prefill"] = {"method": "apb", ...}
    OpenAI            metadata["prefill"], in a stream on the chunk that carries the finish reason

Official point tried: `return_meta_info` is for clients that ask, of chats that do not stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from sglang_apb.patches._patch import Patch

from sglang_apb.requests import PARAMETER


async def _note_report(original: Any, self: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
    """SGLang collects one entry a token; the prompt has one report, which belongs to the first."""
    async for out in original(self, obj, request):
        for item in out if isinstance(out, list) else [out]:
            _keep_first(item["meta_info"], obj)
        yield out


def _keep_first(meta_info: dict[str, Any], obj: Any) -> None:
    entries = meta_info.get(PARAMETER)
    if isinstance(entries, list):
        meta_info.pop(PARAMETER)
        obj.prefill_report = next((entry for entry in entries if entry), getattr(obj, "prefill_report", None))
    report = getattr(obj, "prefill_report", None)
    if report:
        meta_info[PARAMETER] = report


def _add_to_response(result: Any, self: Any, request: Any, ret: list[dict[str, Any]], created: int) -> None:
    report = ret[0]["meta_info"].get(PARAMETER)
    if report and isinstance(getattr(result, "metadata", None), dict):
        result.metadata[PARAMETER] = report


async def _add_to_stream(
    original: Any, self: Any, adapted_request: Any, request: Any, raw_request: Any
) -> AsyncIterator[str]:
    async for chunk in original(self, adapted_request, request, raw_request):
        yield _with_report(chunk, getattr(adapted_request, "prefill_report", None))


def _with_report(chunk: str, report: dict[str, Any] | None) -> str:
    if report is None or '"finish_reason":"' not in chunk:
        return chunk
    content = json.loads(chunk.removeprefix("data: "))
    return f"data: {json.dumps(content | {'metadata': {PARAMETER: report}})}\n\n"


_OPENAI = "sglang.srt.entrypoints.openai"
_BUILD = ("self", "request", "ret", "created")
_STREAM = ("self", "adapted_request", "request", "raw_request")
PATCHES = (
    Patch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        ("self", "obj", "request"),
        _note_report,
    ),
    Patch(f"{_OPENAI}.serving_chat.OpenAIServingChat._build_chat_response", "after", _BUILD, _add_to_response),
    Patch(f"{_OPENAI}.serving_chat.OpenAIServingChat._generate_chat_stream", "around", _STREAM, _add_to_stream),
    Patch(
        f"{_OPENAI}.serving_completions.OpenAIServingCompletion._build_completion_response",
        "after",
        _BUILD,
        _add_to_response,
    ),
    Patch(
        f"{_OPENAI}.serving_completions.OpenAIServingCompletion._generate_completion_stream",
        "around",
        _STREAM,
        _add_to_stream,
    ),
)
