"""Target: `TokenizerManager._validate_one_request`. Reason: a request that cannot be laid out is answered with
HTTP 400 before any rank hears of it, as SGLang does with prompts that are too long. Official point tried: SGLang has
none for checks of one's own.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches import insides
from sglang_apb.patches._patch import Patch

from sglang_apb import requests


def _check(result: None, self: Any, obj: Any, input_ids: list[int]) -> None:
    custom_params = obj.sampling_params.get("custom_params") if obj.sampling_params else None
    requests.check(len(input_ids or ()), custom_params, insides.resolved(self.server_args).page_size)


PATCHES = (
    Patch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "after",
        ("self", "obj", "input_ids"),
        _check,
    ),
)
