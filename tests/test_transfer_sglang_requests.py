"""One bootstrap room used twice, numbers that are none, and requests that SGLang drops without a word."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common import conn
from sglang.srt.disaggregation.common.conn import KVTransferError, PrefillServerInfo
from transfer_peers import (
    AUX_LENS,
    COMPAT,
    EIGHT,
    HEADS,
    NUM_LAYERS,
    Cluster,
    asked,
    cluster,
    decode_endpoint,
    make_pages,
    received,
    rows,
    send_owned,
    wait_for,
)

from sglang_apb.transfer.decode.endpoint import DecodeEndpoint
from sglang_apb.transfer.decode.request import DecodeRequest, RequestState
from sglang_apb.transfer.observer import Failure
from sglang_apb.transfer.prefill.request import PrefillRequest
from sglang_apb.transfer.prefill.transfer import Transfer, TransferState
from sglang_apb.transfer.sglang.manager import ZmqKVManager
from sglang_apb.transfer.sglang.reasons import Reasons
from sglang_apb.transfer.sglang.receiver import ZmqKVReceiver
from sglang_apb.transfer.sglang.sender import ZmqKVSender

ADDRESS = "127.0.0.1:1"
IN_USE = "Bootstrap room 7 is in use: every request needs its own."
NO_ROOMS = [None, "7", -1, 0, 1 << 63, 1 << 70, True, 1.5, [7]]


@pytest.fixture(autouse=True)
def one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What SGLang asks its settings."""
    monkeypatch.setattr(conn, "get_parallel", lambda: SimpleNamespace(num_dp_ranks=1))
    monkeypatch.setattr(conn, "get_disagg", lambda: SimpleNamespace(disaggregation_decode_allocation_policy="early"))


def manager(**endpoint: Any) -> ZmqKVManager:
    """SGLang's dictionaries and what it does with them, without its servers."""
    made = object.__new__(ZmqKVManager)
    dictionaries = (
        *("request_status", "failure_records", "refusals", "connection_pool", "prefill_info_table", "transfer_infos"),
        *("prefill_response_tracker", "required_prefill_response_num_table", "heartbeat_failures"),
        *("_deferred_ack_targets", "_staging_outstanding", "req_to_decode_prefix_len"),
    )
    vars(made).update({name: {} for name in dictionaries})
    vars(made).update(
        failure_lock=threading.Lock(),
        connection_lock=threading.Lock(),
        addr_to_rooms_tracker=defaultdict(set),
        reasons=Reasons(None),
        kv_args=SimpleNamespace(page_size=1, engine_rank=0),
        deferred_bootstrap=None,
        defer_decode_allocation=False,
        enable_deferred_decode_kv_release=False,
        enable_staging=False,
        is_mla_backend=False,
        is_dummy_cp_rank=False,
        sender_trace_module=None,
        num_layers=NUM_LAYERS,
        attn_tp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        contact_seconds=30.0,
        bootstrap_timeout=30.0,
        waiting_timeout=30.0,
        _num_kv_heads=1,
        _deferred_ack_poisoned_rooms=set(),
        _staging_ctx=None,
        **endpoint,
    )
    return made


class Pair:
    """A prefill and a decode server's managers, of which the decode one has found the prefill one."""

    def __init__(self, peers: Cluster) -> None:
        self.peers = peers
        self.prefill, self.decode = manager(prefill_endpoint=peers.senders[0]), manager(decode_endpoint=peers.receiver)
        self.find_prefill()

    def find_prefill(self) -> None:
        info = PrefillServerInfo(1, 1, 1, 1, page_size=1, kv_cache_dtype="auto", follow_bootstrap_room=True)
        info.target_tp_rank, info.target_tp_ranks, info.target_cp_ranks, info.target_pp_ranks = 0, [0], [0], [0]
        self.decode.prefill_info_table[ADDRESS] = info
        rank = {"rank_ip": "127.0.0.1", "rank_port": self.peers.senders[0].port, "key": "", "tp_rank": 0}
        self.decode.connection_pool[f"{ADDRESS}_0_0_0"] = [rank]

    def sender(self, room: Any = 7) -> ZmqKVSender:
        return ZmqKVSender(self.prefill, ADDRESS, room)

    def receiver(self, room: Any = 7) -> ZmqKVReceiver:
        receiver = ZmqKVReceiver(self.decode, ADDRESS, room)
        receiver.init(0)
        return receiver

    def check_served(self, sender: ZmqKVSender, receiver: ZmqKVReceiver) -> None:
        """The request passes; KV of the prefill rank's last eight pages comes to decode's first."""
        assert receiver.poll() == KVPoll.WaitingForInput
        receiver.send_metadata(EIGHT.astype(np.int32), 3)
        assert wait_for(lambda: sender.poll() == KVPoll.WaitingForInput)
        sender.init(8, 5)
        sender.send(EIGHT.astype(np.int32) + 400)
        assert wait_for(lambda: receiver.poll() == KVPoll.Success), receiver.poll()
        assert wait_for(lambda: sender.poll() == KVPoll.Success)
        assert rows(self.peers.pool, EIGHT) == rows(self.peers.pools[0], EIGHT + 400)
        receiver.clear()
        sender.clear()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with cluster() as peers:
        yield Pair(peers)


def check_failed(transfer: ZmqKVSender | ZmqKVReceiver, why: str) -> None:
    """As SGLang asks: it polls, asks why, and clears."""
    assert transfer.poll() == KVPoll.Failed
    with pytest.raises(KVTransferError) as error:
        transfer.failure_exception()
    assert why in error.value.failure_reason and not error.value.is_from_another_rank
    transfer.clear()
    assert transfer.poll() == KVPoll.Failed


@pytest.mark.parametrize("ends", ["fails", "is aborted"])
def test_a_room_that_is_used_again_is_refused_and_the_first_request_is_served(ends: str, pair: Pair) -> None:
    """On both servers. The second may come while the first waits for memory, and several times."""
    sender, receiver = pair.sender(), pair.receiver()
    for _ in range(2):
        others = pair.sender(), pair.receiver()
        assert (sender.poll(), receiver.poll()) == (KVPoll.Bootstrapping, KVPoll.WaitingForInput)
        for other in others:
            if ends == "is aborted":
                other.abort()
                other.clear()
            else:
                check_failed(other, IN_USE)
    pair.check_served(sender, receiver)
    pair.check_served(pair.sender(), pair.receiver())


def test_a_room_that_is_used_again_during_the_transfer_is_refused(pair: Pair) -> None:
    sender, receiver = pair.sender(), pair.receiver()
    receiver.send_metadata(EIGHT.astype(np.int32), 3)
    assert wait_for(lambda: sender.poll() == KVPoll.WaitingForInput)
    for other in (pair.sender(), pair.receiver()):
        check_failed(other, IN_USE)
    sender.init(8, 5)
    sender.send(EIGHT.astype(np.int32) + 400)
    assert wait_for(lambda: receiver.poll() == KVPoll.Success)


def test_a_request_that_was_aborted_leaves_nothing_to_the_next_one_with_its_room(pair: Pair) -> None:
    """SGLang clears no prompt that was aborted in its queue."""
    pair.sender().abort()
    pair.check_served(pair.sender(), pair.receiver())


def test_a_request_whose_record_is_gone_fails_with_a_sentence(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.decode.request_status.clear()
    pair.decode.addr_to_rooms_tracker.clear()
    assert pair.decode.check_status(receiver.bootstrap_room) == KVPoll.Failed
    check_failed(receiver, "SGLang has no record of bootstrap room 7 any more.")


def test_another_prompt_in_the_same_room_does_not_get_the_kv(pair: Pair) -> None:
    """Two requests with as many tokens, of which either server had another one first."""
    sender, receiver = pair.sender(), pair.receiver()
    sender.set_prompt([1, 2, 3, 4, 5, 6, 7, 8])
    receiver.set_prompt([1, 2, 3, 4, 5, 6, 7, 9])
    receiver.send_metadata(EIGHT.astype(np.int32), 3)
    assert wait_for(lambda: sender.poll() == KVPoll.WaitingForInput)
    sender.init(8, 5)
    sender.send(EIGHT.astype(np.int32) + 400)
    assert wait_for(lambda: receiver.poll() == KVPoll.Failed)
    for transfer in (sender, receiver):
        check_failed(transfer, "Two requests have bootstrap room 7")
    assert not any(rows(pair.peers.pool, EIGHT))


def test_the_same_prompt_gets_the_kv(pair: Pair) -> None:
    sender, receiver = pair.sender(), pair.receiver()
    sender.set_prompt(list(range(8)))
    receiver.set_prompt(range(8))
    pair.check_served(sender, receiver)


@contextlib.contextmanager
def another_decode_server() -> Iterator[DecodeEndpoint]:
    endpoint = decode_endpoint(make_pages(None), make_pages(None, AUX_LENS, 8), COMPAT, HEADS)
    endpoint.start()
    try:
        yield endpoint
    finally:
        endpoint.stop()


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("first", ["expects", "asks"])
def test_of_two_decode_servers_with_one_room_the_first_is_served(first: str, is_open: bool) -> None:
    """Whether the prefill server has the request already or not."""
    told: list[Failure] = []
    with cluster() as peers, another_decode_server() as other:
        sender = peers.senders[0]
        transfer = sender.open(7) if is_open else None
        decode = peers.ask(7, EIGHT) if first == "asks" else None
        if decode is None:
            peers.receiver.expect(7, peers.addresses, told.append)
        key = 7, 0
        assert wait_for(lambda: bool(transfer.peer if transfer else sender.transfers._notices.waiting(key)))
        other.expect(7, peers.addresses, told.append)
        assert wait_for(lambda: [failure.reason for failure in told] == [IN_USE])
        refused = other.open(7, peers.addresses, EIGHT, 0)
        assert wait_for(lambda: refused.state is RequestState.FAILED) and refused.reason == IN_USE
        other.close(refused)
        decode = decode or peers.ask(7, EIGHT)
        transfer = transfer or sender.open(7)
        assert asked(transfer)
        send_owned(sender, transfer, EIGHT, [(0, 8)], 0)
        assert received(decode), decode.reason


def test_who_asks_for_a_request_that_was_refused_is_told_so_when_the_first_has_ended() -> None:
    with cluster() as peers:
        transfer = serve(peers, peers.ask(7, EIGHT))
        PrefillRequest(peers.senders[0], 7)
        peers.senders[0].close(transfer)
        decode = peers.ask(7, EIGHT)
        assert wait_for(lambda: decode.state is RequestState.FAILED) and decode.reason == IN_USE


def test_what_a_past_request_expected_is_not_the_next_ones() -> None:
    """The prefill rank of the first gave it up while it waited for memory; SGLang clears it when it polls it next."""
    told: list[Failure] = []
    with cluster() as peers:
        transfer = peers.senders[0].open(7)
        first = peers.receiver.expect(7, peers.addresses, told.append)
        assert wait_for(lambda: transfer.peer != b"")
        peers.senders[0].close(transfer)
        assert wait_for(lambda: bool(told))
        peers.senders[0].open(7)
        second = peers.receiver.expect(7, peers.addresses, told.append)
        peers.receiver.expect_no_more(first)
        with pytest.raises(ValueError, match="Bootstrap room 7 is in use"):
            peers.receiver.open(7, peers.addresses, EIGHT, 3, expected=first)
        assert peers.receiver.open(7, peers.addresses, EIGHT, 3, expected=second).state is RequestState.RECEIVING


def test_an_ask_for_the_next_request_in_a_room_waits_for_it() -> None:
    """Decode is through with the first one sooner than SGLang's prefill scheduler."""
    with cluster() as peers:
        sender = peers.senders[0]
        transfer = serve(peers, peers.ask(7, EIGHT))
        decode = peers.ask(7, EIGHT)
        assert wait_for(lambda: sender.transfers._notices.waiting((7, 0)) != b"")
        sender.close(transfer)
        serve(peers, decode)


def serve(peers: Cluster, decode: DecodeRequest) -> Transfer:
    """Decode is through with it, the prefill rank not yet."""
    transfer = peers.senders[0].open(7)
    assert asked(transfer)
    send_owned(peers.senders[0], transfer, EIGHT, [(0, 8)], 0)
    assert received(decode), decode.reason
    assert wait_for(lambda: transfer.state is TransferState.DONE)
    peers.receiver.close(decode)
    return transfer


@pytest.mark.parametrize("room", NO_ROOMS)
def test_what_is_no_room_fails_its_own_request(room: Any, pair: Pair) -> None:
    sender, receiver = pair.sender(room), pair.receiver(room)
    sender.set_owned_pages([(0, 8)])
    for transfer in (sender, receiver):
        check_failed(transfer, "must be a whole number from 1 to 2^63 - 1")
        transfer.abort()
    pair.check_served(pair.sender(), pair.receiver())


def raise_error(*_: Any, **__: Any) -> None:
    raise KeyError("what nobody thought of")


_APB, _SGLANG = "sglang_apb.transfer", "sglang.srt.disaggregation.common.conn"
IN_SENDERS = {
    "__init__": f"{_APB}.sglang.sender.PrefillRequest",
    "set_prompt": f"{_APB}.sglang.sender.digest_of",
    "send": f"{_APB}.sglang.sender.ZmqKVSender._can_send",
    "stream_layer": f"{_APB}.sglang.sender.ZmqKVSender._can_send",
    "refuse": f"{_APB}.prefill.request.PrefillRequest.close",
    "pop_decode_prefix_len": f"{_APB}.prefill.request.PrefillRequest.asks",
    "poll": f"{_APB}.prefill.request.PrefillRequest.wait_for_others",
    "get_transfer_metric": f"{_APB}.prefill.request.PrefillRequest.num_bytes",
    "abort": f"{_SGLANG}.CommonKVSender.abort",
    "clear": f"{_SGLANG}.CommonKVSender.clear",
    "failure_exception": f"{_APB}.sglang.reasons.Reasons.find",
}
IN_RECEIVERS = {
    "__init__": f"{_SGLANG}.CommonKVReceiver.__init__",
    "init": f"{_APB}.sglang.manager.ZmqKVManager.shares",
    "set_prompt": f"{_APB}.sglang.receiver.digest_of",
    "send_metadata": f"{_APB}.decode.endpoint.DecodeEndpoint.open",
    "poll": f"{_APB}.sglang.manager.ZmqKVManager.check_status",
    "abort": f"{_SGLANG}.CommonKVReceiver.abort",
    "clear": f"{_SGLANG}.CommonKVReceiver.clear",
    "failure_exception": f"{_APB}.sglang.reasons.Reasons.find",
}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "set_prompt": ([1],),
    "send": (EIGHT,),
    "stream_layer": (0, lambda: EIGHT),
    "refuse": ("The prompt is too long.",),
    "send_metadata": (EIGHT, 3),
}
UNEXPECTED = "The KV transfer failed on an error in this server"


@pytest.mark.parametrize("method", IN_SENDERS)
def test_an_error_in_a_sender_ends_its_request_only(method: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pair.sender(), pair.receiver()
    with monkeypatch.context() as broken:
        what = raise_error if method not in ("pop_decode_prefix_len", "get_transfer_metric") else property(raise_error)
        broken.setattr(IN_SENDERS[method], what)
        check_ends_with_an_error(pair.sender(8), method)
    pair.check_served(*first)


@pytest.mark.parametrize("method", IN_RECEIVERS)
def test_an_error_in_a_receiver_ends_its_request_only(method: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pair.sender(), pair.receiver()
    with monkeypatch.context() as broken:
        if method in ("__init__", "init"):
            broken.setattr(IN_RECEIVERS[method], raise_error)
        other = pair.receiver(8)
        broken.setattr(IN_RECEIVERS[method], raise_error)
        check_ends_with_an_error(other, method)
    pair.check_served(*first)


def check_ends_with_an_error(transfer: Any, method: str) -> None:
    """Nothing is raised, and SGLang hears of it at the next poll."""
    if method == "failure_exception":
        with pytest.raises(KVTransferError, match=UNEXPECTED):
            transfer.failure_exception()
    elif method not in ("__init__", "init"):
        getattr(transfer, method)(*ARGUMENTS.get(method, ()))
    assert transfer.poll() == KVPoll.Failed
    with pytest.raises(KVTransferError):
        transfer.failure_exception()
    transfer.clear()
    transfer.abort()
    assert transfer.poll() == KVPoll.Failed


def test_an_error_leaves_no_page_open_to_late_writes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang frees the pages after `clear`."""
    sender, receiver = pair.sender(), pair.receiver()
    receiver.send_metadata(EIGHT.astype(np.int32), 3)
    assert wait_for(lambda: sender.poll() == KVPoll.WaitingForInput)
    for broken in ("CommonKVReceiver.clear", "CommonKVSender.clear"):
        monkeypatch.setattr(f"{_SGLANG}.{broken}", raise_error)
    receiver.clear()
    sender.clear()
    assert not pair.peers.receiver._requests and not len(pair.peers.senders[0].transfers)


def test_an_error_in_asking_for_a_prompt_again_ends_its_request_only(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's decode server does that after its weights have changed."""
    first, other = (pair.sender(), pair.receiver()), pair.receiver(8)
    monkeypatch.setattr(f"{_SGLANG}.CommonKVManager.submit_prefill_recompute", raise_error)
    pair.decode.submit_prefill_recompute(other, {})
    check_failed(other, UNEXPECTED)
    pair.check_served(*first)


def test_a_prefill_rank_that_the_directory_did_not_find_is_not_asked_for_by_the_scheduler(pair: Pair) -> None:
    """The next request looks the server up again."""
    pair.decode.connection_pool.clear()
    check_failed(pair.receiver(), "Could not fetch bootstrap info for: prefill_dp_rank: 0")
    assert ADDRESS not in pair.decode.prefill_info_table
    pair.find_prefill()
    pair.check_served(pair.sender(), pair.receiver())


def test_a_rank_that_never_was_does_not_have_the_server_forgotten(pair: Pair) -> None:
    """A client may name it; others use the server meanwhile."""
    receiver = ZmqKVReceiver(pair.decode, ADDRESS, 8)
    receiver.init(5)
    check_failed(receiver, "Could not fetch bootstrap info for: prefill_dp_rank: 5")
    assert ADDRESS in pair.decode.prefill_info_table
    pair.check_served(pair.sender(), pair.receiver())


class CollectingLock:
    """Whatever is allocated under a lock may start the garbage collector; here it always runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        gc.collect()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_requests_may_be_forgotten_while_another_one_is_opened() -> None:
    """SGLang's requests are parts of reference cycles, so the garbage collector ends them: anywhere, at any time."""
    with cluster() as peers:
        sender = peers.senders[0]
        decode = [peers.ask(number, EIGHT) for number in (1, 2)]
        gc.disable()
        try:
            for number in (1, 2):
                forget_later(PrefillRequest(sender, number))
            assert wait_for(
                lambda: all(transfer.state is TransferState.ASKED for transfer in sender.transfers._open.values())
            )
            sender.transfers._lock = CollectingLock()  # type: ignore[assignment]
            opened = threading.Thread(target=sender.open, args=(3,), daemon=True)
            opened.start()
            opened.join(10.0)
        finally:
            gc.enable()
        assert not opened.is_alive(), "the garbage collector waits for a lock that its own thread holds"
        assert not any(map(received, decode)) and all("gave the request up" in request.reason for request in decode)
        assert wait_for(lambda: list(sender.transfers._open) == [(3, 0)])
        sender.open(1)


def test_the_room_of_a_request_that_is_closed_is_free_at_once() -> None:
    """Also when the transfer's thread has other things to do. Whoever waits for the first hears of its end."""
    with cluster() as peers:
        sender, is_busy = peers.senders[0], threading.Event()
        decode, first = peers.ask(7, EIGHT), sender.open(7)
        assert asked(first)
        sender.call(partial(is_busy.wait, 5.0))
        sender.close(first)
        assert sender.transfers.find((7, 0)) is None and len(sender.transfers) == 0
        second = sender.open(7)
        is_busy.set()
        assert not received(decode) and "gave the request up" in decode.reason
        peers.receiver.close(decode)
        assert sender.transfers.find((7, 0)) is second and second.state is TransferState.UNASKED


@pytest.mark.parametrize("is_asked_first", [True, False])
def test_who_waits_for_a_request_that_prefill_refuses_hears_why(is_asked_first: bool) -> None:
    with cluster() as peers:
        sender = peers.senders[0]
        opened, served = sender.open(2), peers.ask(2, EIGHT)
        assert asked(opened)
        decode = peers.ask(1, EIGHT) if is_asked_first else None
        assert decode is None or wait_for(lambda: (1, 0) in sender.transfers._notices)
        for number in (1, 2):
            sender.refuse(number, "The prompt is too long here.")
        assert wait_for(lambda: (1, 0) in sender.transfers._given_up)
        decode = decode or peers.ask(1, EIGHT)
        assert not received(decode) and decode.reason == "The prompt is too long here."
        send_owned(sender, opened, EIGHT, [(0, 8)], 0)
        assert received(served), served.reason


def test_prefill_that_has_refused_a_request_is_still_known(pair: Pair) -> None:
    """Refused before decode expects it; decode refuses the next one, and tells it so."""
    pair.peers.senders[0].refuse(7, "The prompt is too long here.")
    receiver = pair.receiver(7)
    assert wait_for(lambda: receiver.poll() == KVPoll.Failed)
    check_failed(receiver, "The prompt is too long here.")
    sender = pair.sender(8)
    pair.decode.refuse_room(ADDRESS, 8, "The prompt is too long there.")
    assert wait_for(lambda: sender.poll() == KVPoll.Failed)
    check_failed(sender, "The prompt is too long there.")


def test_a_request_that_never_comes_to_prefill_is_given_up() -> None:
    """Not while the scheduler computes: it has not looked then."""
    with cluster() as peers:
        sender = peers.senders[0]
        sender._contact_seconds = 0.3
        decode = peers.ask(1, EIGHT)
        assert wait_for(lambda: (1, 0) in sender.transfers._notices)
        sender.pass_scheduler()
        time.sleep(1.0)
        assert decode.state is RequestState.RECEIVING
        sender.pass_scheduler()
        assert not received(decode) and "has not got the request within 0.3 s" in decode.reason


def forget_later(transfers: PrefillRequest) -> None:
    """Only the garbage collector finds it."""
    cycle: list[object] = [transfers]
    cycle.append(cycle)
