"""Target: `http_server._setup_and_run_http_server`. Reason: SGLang's models of a request's body read fields before they
check types (`response_format.get`, of a chat): a body or a field of another type raises there, which is HTTP 500.
Official point: FastAPI's exception handlers. They can be added until the server runs, so its start is hooked.
"""

from __future__ import annotations

import traceback
from typing import Any

from sglang_apb.patches._patch import Patch

_ERRORS = (AttributeError, KeyError, TypeError)
_MODELS = "openai/protocol.py"


def _add_handlers(*_: Any, **__: Any) -> None:
    from sglang.srt.entrypoints.http_server import app

    for kind in _ERRORS:
        app.add_exception_handler(kind, answer)


async def answer(request: Any, error: Exception) -> Any:
    """As SGLang answers a body that does not fit its model. Raises every other error anew, which is HTTP 500."""
    from fastapi.exceptions import RequestValidationError

    if not traceback.extract_tb(error.__traceback__)[-1].filename.endswith(_MODELS):
        raise error
    what = {"type": "value_error", "loc": ("body",), "msg": f"a field does not have the type that it should: {error}"}
    return await request.app.exception_handlers[RequestValidationError](request, RequestValidationError([what]))


PATCHES = (
    Patch(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "before",
        (
            *("server_args", "tokenizer_manager", "template_manager", "port_args", "scheduler_infos"),
            *("subprocess_watchdog", "execute_warmup_func", "launch_callback"),
        ),
        _add_handlers,
    ),
)
