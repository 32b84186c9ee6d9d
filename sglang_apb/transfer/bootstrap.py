"""The HTTP side of finding each other: SGLang's bootstrap server, which also says what is spoken."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import requests
from aiohttp import web
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer, PrefillServerInfo

from sglang_apb.transfer.wire import VERSION

logger = logging.getLogger(__name__)

BACKEND = "zmq"
_SERVER_QUERY = {
    "prefill_dp_rank": "-1",
    "prefill_cp_rank": "-1",
    "target_tp_rank": "-1",
    "target_pp_rank": "-1",
    "transfer_backend": BACKEND,
}
_INFO_FIELDS = frozenset(field.name for field in dataclasses.fields(PrefillServerInfo))


class ZmqKVBootstrapServer(CommonKVBootstrapServer):
    async def _handle_route_get(self, request: web.Request) -> web.Response:
        asks_for_server = request.query.get("prefill_dp_rank") == "-1"
        if asks_for_server and request.query.get("transfer_backend") != BACKEND:
            text = (
                f"This prefill server moves KV with --disaggregation-transfer-backend {BACKEND} "
                f"(sglang-apb), the decode server at {request.remote} does not: start it with the same "
                f"option."
            )
            logger.error(text)
            return web.Response(text=text, status=409)
        response = await super()._handle_route_get(request)
        if asks_for_server and response.status == 200:
            response.headers["X-Transfer-Backend"] = BACKEND
            response.headers["X-Transfer-Version"] = str(VERSION)
        return response


def fetch_prefill_info(bootstrap_addr: str) -> tuple[PrefillServerInfo | None, str]:
    """The prefill server's layout, and a sentence when it cannot send to this decode server ("" when it can).

    None when the server does not answer, or is not ready: the caller asks again later.
    """
    try:
        response = requests.get(f"http://{bootstrap_addr}/route", params=_SERVER_QUERY, timeout=5)
        if response.status_code != 200:
            logger.warning("Prefill server %s: %s %s", bootstrap_addr, response.status_code, response.text)
            return None, ""
        answer: dict[str, Any] = response.json()
        info = PrefillServerInfo(**{key: answer[key] for key in _INFO_FIELDS & answer.keys()})
    except (requests.RequestException, ValueError, TypeError) as error:
        logger.warning("Prefill server %s did not answer: %s", bootstrap_addr, type(error).__name__)
        return None, ""
    return info, _find_refusal(bootstrap_addr, response.headers)


def _find_refusal(bootstrap_addr: str, headers: Any) -> str:
    backend = headers.get("X-Transfer-Backend")
    if backend != BACKEND:
        return (
            f"The decode server moves KV with --disaggregation-transfer-backend {BACKEND} (sglang-apb), the "
            f"prefill server at {bootstrap_addr} does not: start it with the same option."
        )
    version = headers.get("X-Transfer-Version")
    if version != str(VERSION):
        return (
            f"The prefill server at {bootstrap_addr} speaks wire version {version}, the decode server "
            f"{VERSION}: install the same version of sglang-apb on both."
        )
    return ""
