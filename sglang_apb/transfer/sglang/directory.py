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
import urllib3
from sglang.srt.disaggregation.common.conn import PrefillServerInfo

from sglang_apb.transfer.protocol import hosts
from sglang_apb.transfer.protocol.config import OPTION
from sglang_apb.transfer.protocol.keys import Keys
from sglang_apb.transfer.sglang.bootstrap import (
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

logger = logging.getLogger(__name__)

# The scheduler waits for an answer this long: a server that is there answers in a few ms.
WAIT_S = 0.05
HTTP_TIMEOUT_S = 3.0
# A server that has not answered for as long is said to be gone.
GIVE_UP_S = 4.0
# Who waits asks once a second. What was silent before such a pause may not be any more.
MAX_PAUSE_S = 2.5
# A server may have been restarted since with other ports.
MAX_AGE_S = 10.0
# Clients name what address they like: those that lead nowhere, which takes seconds to find out, hold up no others.
_MAX_LOOKUPS = 32
_MAX_CHARS = 100


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
        self._executor = ThreadPoolExecutor(_MAX_LOOKUPS, thread_name_prefix="kv-directory")
        self._asked: dict[str, _Asked] = {}

    def find(self, bootstrap_addr: str) -> Entry | None:
        """None while the server has not answered; after GIVE_UP_S an entry that says so. Raises nothing."""
        now = time.monotonic()
        asked = self._asked.get(bootstrap_addr)
        if asked is None or now - asked.last > MAX_PAUSE_S:
            self._forget_old(now)
            asked = self._asked[bootstrap_addr] = _Asked(now, asked.lookup if asked else None)
        asked.last = now
        entry = self._answer(bootstrap_addr, asked)
        if entry is None and time.monotonic() - asked.since >= GIVE_UP_S:
            nothing = PrefillServerInfo(1, 1, 1, 1, page_size=None, kv_cache_dtype=None, follow_bootstrap_room=True)
            entry = Entry(nothing, refusal=f"The prefill server at {_shown(bootstrap_addr)} does not answer.")
        if entry is not None:
            del self._asked[bootstrap_addr]
        return entry

    def _answer(self, bootstrap_addr: str, asked: _Asked) -> Entry | None:
        try:
            if asked.lookup is None or asked.is_too_old:
                asked.lookup = self._executor.submit(self._look_up_now, bootstrap_addr)
            entry, _ = asked.lookup.result(WAIT_S)
            return entry
        except TimeoutError:
            return None
        except Exception as error:
            asked.lookup = None
            unexpected = not isinstance(error, NotThere)
            logger.warning("KV transfer: %s", error, exc_info=unexpected)
            return None

    def _look_up_now(self, bootstrap_addr: str) -> tuple[Entry, float]:
        return self._look_up(bootstrap_addr), time.monotonic()

    def _forget_old(self, now: float) -> None:
        """Servers that nobody has asked for any more, since the request was given up."""
        self._asked = {address: asked for address, asked in self._asked.items() if now - asked.last < MAX_AGE_S}


@dataclass
class _Asked:
    """What those who wait for a server have asked it: `since` when and when `last`, without a pause."""

    since: float
    lookup: Future[tuple[Entry, float]] | None = None
    last: float = 0.0

    @property
    def is_too_old(self) -> bool:
        """Whether it was answered so long ago that it may not be true any more."""
        if self.lookup is None or not self.lookup.done() or self.lookup.exception() is not None:
            return False
        _, when = self.lookup.result()
        return time.monotonic() - when > MAX_AGE_S


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
    where = f"Prefill server {_shown(bootstrap_addr)}"
    try:
        response = requests.get(f"http://{bootstrap_addr}/route", params=query, timeout=HTTP_TIMEOUT_S, stream=True)
        body = response.raw.read(MAX_BYTES + 1, decode_content=True)
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise NotThere(f"{where} did not answer: {type(error).__name__}") from error
    if response.status_code != 200:
        raise NotThere(f"{where}: {response.status_code} {body[:500].decode(errors='replace')}")
    try:
        return decode(body, kind), response.headers
    except ValueError as error:
        raise NotThere(f"{where} answered what cannot be: {error}") from error


def _shown(bootstrap_addr: str) -> str:
    """As a sentence may have it: a client may have named anything."""
    short = bootstrap_addr if len(bootstrap_addr) <= _MAX_CHARS else f"{bootstrap_addr[:_MAX_CHARS]}..."
    return short if short.isprintable() else ascii(short)
