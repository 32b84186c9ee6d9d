"""Target: `prefill.is_unadmitted_reject`, on prefill servers with our transfer. Reason: SGLang drops a prompt that it
refuses before it has a sender, and the decode server would wait for its KV in vain.

SGLang's registry puts a hook wherever the function was imported, in decode's module too: a decode server must keep its
own. Official point tried: none is asked before the prompt is dropped.
"""

from __future__ import annotations

from typing import Any

from sglang_apb.patches import insides
from sglang_apb.patches._patch import Patch


def _refuse_later(original: Any, req: Any) -> bool:
    return False if insides.has_decode_server(req) else original(req)


PATCHES = (Patch("sglang.srt.disaggregation.prefill.is_unadmitted_reject", "around", ("req",), _refuse_later),)
