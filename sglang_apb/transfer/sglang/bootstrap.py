"""The HTTP side of finding each other: SGLang's bootstrap server, which also says what is spoken.

What anyone may send to it is bounded and checked here before SGLang's handlers see it.
"""

from __future__ import annotations

import ipaddress
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

from sglang_apb.options import bootstrap_port_taken
from sglang_apb.transfer.protocol.config import BACKEND
from sglang_apb.transfer.protocol.hosts import why_not_free
from sglang_apb.transfer.protocol.wire import VERSION

logger = logging.getLogger(__name__)

KEY_HEADER = "X-Transfer-Key"
MAX_BYTES = 1 << 20
MAX_ROOMS = 1 << 16
_START_POLL_S = 0.01
ALL_RANKS = dict.fromkeys(("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"), "-1")

Size = Annotated[int, Meta(ge=1, le=1 << 16)]
Rank = Annotated[int, Meta(ge=0, lt=1 << 16)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Room = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Text = Annotated[str, Meta(max_length=256)]
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.Response]]


class Registration(msgspec.Struct):
    """What a prefill rank says of itself (SGLang's `CommonKVManager.register_to_bootstrap`)."""

    attn_tp_size: Size
    attn_tp_rank: Rank
    attn_cp_size: Size
    attn_cp_rank: Rank
    attn_dp_size: Size
    attn_dp_rank: Rank
    pp_size: Size
    pp_rank: Rank
    system_dp_size: Size
    system_dp_rank: Rank
    rank_ip: Text
    rank_port: Port
    page_size: Size
    kv_cache_dtype: Text
    load_balance_method: Text = "follow_bootstrap_room"
    enable_dsa_cache_layer_split: bool = False
    enable_kv_cache_sharding: bool = False
    decode_allocation_policy: Text = "early"
    prefill_http_port: Port | None = None

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.rank_ip)


class DpRank(msgspec.Struct):
    bootstrap_room: Room
    dp_rank: Rank


class Rooms(msgspec.Struct):
    bootstrap_rooms: Annotated[list[Room], Meta(max_length=MAX_ROOMS)]


def decode(body: bytes, kind: type[T]) -> T:
    """`body` as JSON of one `kind`. Raises ValueError when it is too long, or a field missing or out of bounds."""
    if len(body) > MAX_BYTES:
        raise ValueError(f"{len(body)} bytes are more than {MAX_BYTES}")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error


class ZmqKVBootstrapServer(CommonKVBootstrapServer):
    """`public_key`: what decode servers will expect this server's ranks to have; "" without keys.

    Ends the process when it cannot listen: its options were checked, but another may have taken the port since, and
    this server's ranks would register there.
    """

    public_key = ""

    @classmethod
    def with_key(cls, public_key: str) -> type[ZmqKVBootstrapServer]:
        """A class, which SGLang makes the server of with a host and a port."""
        return type(cls.__name__, (cls,), {"public_key": public_key})

    def run(self) -> None:
        super().run()
        while not self._is_listening():
            if not self.thread.is_alive():
                why = why_not_free(self.host, self.port) or "the log says why"
                print(f"sglang: error: {bootstrap_port_taken(self.port, why)}", file=sys.stderr)
                raise SystemExit(2)
            time.sleep(_START_POLL_S)

    def _is_listening(self) -> bool:
        runner = getattr(self, "_runner", None)  # made by the thread
        return runner is not None and bool(runner.addresses)

    async def _handle_route_put(self, request: web.Request) -> web.Response:
        return await self._checked(request, Registration, super()._handle_route_put)

    async def _handle_register_dp_rank(self, request: web.Request) -> web.Response:
        if len(self.room_to_dp_rank) >= MAX_ROOMS:
            return web.Response(text=f"{MAX_ROOMS} rooms are waiting already.", status=503)
        return await self._checked(request, DpRank, super()._handle_register_dp_rank)

    async def _handle_query_dp_ranks(self, request: web.Request) -> web.Response:
        return await self._checked(request, Rooms, super()._handle_query_dp_ranks)

    async def _checked(self, request: web.Request, kind: type[msgspec.Struct], handler: Handler) -> web.Response:
        # aiohttp refuses a body over 1 MiB while it reads it.
        body = await request.read()
        try:
            decode(body, kind)
        except ValueError as error:
            logger.warning("KV transfer: refused what %s sent to the bootstrap server: %s", request.remote, error)
            return web.Response(text=str(error), status=400)
        return await handler(request)

    async def _handle_route_get(self, request: web.Request) -> web.Response:
        if any(not _is_rank(request.query.get(name, "")) for name in ALL_RANKS):
            return web.Response(text=f"{', '.join(ALL_RANKS)} must be ranks, or -1.", status=400)
        asks_for_server = request.query["prefill_dp_rank"] == "-1"
        if asks_for_server and request.query.get("transfer_backend") != BACKEND:
            text = (
                f"This prefill server moves KV with --disaggregation-transfer-backend {BACKEND} "
                f"(sglang-apb), the decode server at {request.remote} does not: start it with the same "
                f"option."
            )
            logger.error(text)
            return web.Response(text=text, status=409)
        response: web.Response = await super()._handle_route_get(request)
        if asks_for_server and response.status == 200:
            response.headers["X-Transfer-Backend"] = BACKEND
            response.headers["X-Transfer-Version"] = str(VERSION)
            response.headers[KEY_HEADER] = self.public_key
        return response


def _is_rank(text: str) -> bool:
    return text == "-1" or (text.isascii() and text.isdigit() and len(text) <= 5)


def find_refusal(bootstrap_addr: str, headers: Any) -> str:
    """Why the decode server cannot work with what answered with these HTTP headers; "" when it can."""
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
