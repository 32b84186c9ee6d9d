"""Decode side: where the ranks of prefill servers listen. Asks bootstrap servers without holding anyone up."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass, field
from typing import Any

import msgspec
import requests
from sglang.srt.disaggregation.common.conn import PrefillServerInfo

from sglang_apb.transfer import hosts
from sglang_apb.transfer.bootstrap import (
    ALL_RANKS,
    BACKEND,
    KEY_HEADER,
    MAX_BYTES,
    Port,
    Size,
    Text,
    decode,
    find_refusal,
)
from sglang_apb.transfer.config import OPTION
from sglang_apb.transfer.keys import Keys

logger = logging.getLogger(__name__)

# The scheduler waits for an answer this long: a server that is there answers in a few ms.
WAIT_S = 0.05
HTTP_TIMEOUT_S = 3.0
# A server that has not answered for as long is said to be gone.
GIVE_UP_S = 4.0


class ServerAnswer(msgspec.Struct):
    """A prefill server's layout (SGLang's PrefillServerInfo)."""

    attn_tp_size: Size
    attn_cp_size: Size
    dp_size: Size
    pp_size: Size
    page_size: Size | None = None
    kv_cache_dtype: Text | None = None
    follow_bootstrap_room: bool = True
    enable_dsa_cache_layer_split: bool = False
    enable_kv_cache_sharding: bool = False
    decode_allocation_policy: Text = "early"
    prefill_http_port: Port | None = None


class RankAnswer(msgspec.Struct):
    rank_ip: Text
    rank_port: Port

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.rank_ip)


@dataclass(frozen=True)
class Entry:
    """A prefill server: its layout with the ranks to ask, their addresses by SGLang's key, or why it cannot be used."""

    info: PrefillServerInfo
    ranks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refusal: str = ""


class NotThere(Exception):
    """The server does not answer, or has not got all its ranks yet."""


# Fills in the ranks that this decode rank asks (SGLang's `_resolve_rank_mapping`), and the key of each (dp, cp).
Resolve = Callable[[PrefillServerInfo], None]


class PrefillDirectory:
    """`find` is called by the scheduler's thread again and again until it gives an entry."""

    def __init__(self, resolve: Resolve, keys: Keys | None = None, *, allow_unencrypted: bool = False):
        self._look_up = Lookup(resolve, keys, allow_unencrypted)
        self._executor = ThreadPoolExecutor(4, thread_name_prefix="kv-directory")
        self._asked: dict[str, Future[Entry]] = {}
        self._silent_since: dict[str, float] = {}

    def find(self, bootstrap_addr: str) -> Entry | None:
        """None while the server has not answered; after GIVE_UP_S an entry that says so."""
        asked = self._asked.get(bootstrap_addr)
        if asked is None:
            asked = self._asked[bootstrap_addr] = self._executor.submit(self._look_up, bootstrap_addr)
        try:
            entry = asked.result(WAIT_S)
        except TimeoutError:
            return self._without_answer(bootstrap_addr)
        except Exception as error:
            del self._asked[bootstrap_addr]
            unexpected = not isinstance(error, NotThere)
            logger.warning("KV transfer: %s", error, exc_info=unexpected)
            return self._without_answer(bootstrap_addr)
        del self._asked[bootstrap_addr]
        self._silent_since.pop(bootstrap_addr, None)
        return entry

    def _without_answer(self, bootstrap_addr: str) -> Entry | None:
        since = self._silent_since.setdefault(bootstrap_addr, time.monotonic())
        if time.monotonic() - since < GIVE_UP_S:
            return None
        del self._silent_since[bootstrap_addr]
        nothing = PrefillServerInfo(1, 1, 1, 1, page_size=None, kv_cache_dtype=None, follow_bootstrap_room=True)
        return Entry(nothing, refusal=f"The prefill server at {bootstrap_addr} does not answer.")


@dataclass(frozen=True)
class Lookup:
    """Asks a bootstrap server for its layout and its ranks' addresses. Raises NotThere."""

    resolve: Resolve
    keys: Keys | None = None
    allow_unencrypted: bool = False

    def __call__(self, bootstrap_addr: str) -> Entry:
        answer, headers = _get(bootstrap_addr, ALL_RANKS | {"transfer_backend": BACKEND}, ServerAnswer)
        info = PrefillServerInfo(**msgspec.structs.asdict(answer))
        key = headers.get(KEY_HEADER, "")
        refusal = find_refusal(bootstrap_addr, headers) or self._refuse_key(bootstrap_addr, key)
        if refusal:
            logger.error(refusal)
            return Entry(info, refusal=refusal)
        self.resolve(info)
        ranks = {
            f"{bootstrap_addr}_{dp_rank}_{cp_rank}_{info.target_tp_rank}": [
                _rank(bootstrap_addr, dp_rank, cp_rank, tp_rank, key) for tp_rank in info.target_tp_ranks or ()
            ]
            for dp_rank in range(info.dp_size)
            for cp_rank in info.target_cp_ranks or ()
        }
        return Entry(info, ranks, "" if key or self.allow_unencrypted else _refuse_network(ranks))

    def _refuse_key(self, bootstrap_addr: str, key: str) -> str:
        if self.keys is None:
            return f"The prefill server at {bootstrap_addr} encrypts KV: give this server {OPTION} too." if key else ""
        if not key:
            return f"This server encrypts KV, the prefill server at {bootstrap_addr} does not: give it {OPTION} too."
        if not self.keys.peers.allows(key):
            return f"The prefill server at {bootstrap_addr} has the key {key}, which is not among this server's peers."
        return ""


def _refuse_network(ranks: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    for rank in (rank for group in ranks.values() for rank in group):
        if not hosts.is_loopback(rank["rank_ip"]):
            return (
                f"KV would come unencrypted from {rank['rank_ip']}: make keys with `sglang-apb keys` and give both "
                f"servers {OPTION}, with them or with allow_unencrypted."
            )
    return ""


def _rank(bootstrap_addr: str, dp_rank: int, cp_rank: int, tp_rank: int, key: str) -> dict[str, Any]:
    query = zip(ALL_RANKS, (dp_rank, cp_rank, tp_rank, 0), strict=True)
    answer, _ = _get(bootstrap_addr, {name: str(rank) for name, rank in query}, RankAnswer)
    return {**msgspec.structs.asdict(answer), "is_dummy": False, "key": key, "tp_rank": tp_rank}


def _get(bootstrap_addr: str, query: dict[str, str], kind: type[Any]) -> tuple[Any, Any]:
    try:
        response = requests.get(f"http://{bootstrap_addr}/route", params=query, timeout=HTTP_TIMEOUT_S, stream=True)
        body = response.raw.read(MAX_BYTES + 1, decode_content=True)
    except (requests.RequestException, OSError) as error:
        raise NotThere(f"Prefill server {bootstrap_addr} did not answer: {type(error).__name__}") from error
    if response.status_code != 200:
        raise NotThere(f"Prefill server {bootstrap_addr}: {response.status_code} {body[:500].decode(errors='replace')}")
    try:
        return decode(body, kind), response.headers
    except ValueError as error:
        raise NotThere(f"Prefill server {bootstrap_addr} answered what cannot be: {error}") from error
