"""Blocks that arrive straight in a request's pages: whoever frees these waits for them."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transfer_peers
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import KVTransferError
from transfer_peers import (
    EIGHT,
    Cluster,
    Tubes,
    cluster,
    connect,
    connected,
    half_of,
    opened,
    received,
    rows,
    send_owned,
    wait_for,
)

from sglang_apb.transfer.decode import endpoint
from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.observer import Cause, Failure
from sglang_apb.transfer.planes.nccl import channels, fetcher
from sglang_apb.transfer.planes.nccl.channel import NcclReceiver
from sglang_apb.transfer.planes.nccl.channels import ChannelError
from sglang_apb.transfer.planes.nccl.receive import NcclReceive
from sglang_apb.transfer.planes.nccl.send import NcclSend
from sglang_apb.transfer.prefill.transfer import TransferState
from sglang_apb.transfer.protocol.wire import Block
from sglang_apb.transfer.sglang.reasons import Reasons
from sglang_apb.transfer.sglang.receiver import ZmqKVReceiver
from sglang_apb.transfer.worker import Worker


def test_a_block_comes_straight_to_pages_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(tubes=Tubes()) as peers:
        monkeypatch.setattr(transfer_peers._TubeEnd, "write", None)
        decode, transfer = opened(peers, 1)
        send_owned(peers.senders[0], transfer, np.arange(20, 28), [(0, 8)], 5)
        assert received(decode), decode.reason
        assert rows(peers.pool, EIGHT) == rows(peers.pools[0], np.arange(20, 28))


@pytest.mark.parametrize("comes", [True, False])
def test_pages_are_freed_when_nothing_comes_there_any_more(comes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is on its way straight to them is waited for; one that does not come has its channel given up."""
    monkeypatch.setattr(endpoint, "ARRIVAL_GRACE_S", 10.0 if comes else 0.1)
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        before = rows(peers.pool, EIGHT)
        tubes.before_arrival = lambda: False
        decode, transfer = opened(peers, 1)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert wait_for(lambda: decode.is_arriving)
        end = threading.Thread(target=peers.receiver.close, args=(decode,))
        end.start()
        end.join(0.05)
        assert end.is_alive()
        tubes.before_arrival = lambda: comes
        end.join(5.0)
        assert not end.is_alive()
        assert rows(peers.pool, EIGHT) == (rows(peers.pools[0], np.arange(8)) if comes else before)
        assert all(end.is_closed for end in tubes.ends if not end.is_prefill) != comes
        tubes.before_arrival = lambda: True
        connect(peers)
        decode, transfer = opened(peers, 2)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert received(decode) and decode.data_plane == "nccl"


def test_a_channel_that_still_brings_blocks_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow link, over which blocks of others are before those of a request that has ended."""
    monkeypatch.setattr(endpoint, "ARRIVAL_GRACE_S", 0.15)
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        arrives = threading.Semaphore(0)
        tubes.before_arrival = lambda: arrives.acquire(blocking=False)
        transfers = [opened(peers, number, np.arange(8 * number, 8 * number + 8)) for number in range(4)]
        for decode, transfer in transfers:
            send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
            assert wait_for(lambda decode=decode: decode.is_arriving)
        last = transfers[3][0]
        end = threading.Thread(target=peers.receiver.close, args=(last,))
        end.start()
        for decode, _ in transfers:
            time.sleep(0.1)
            assert end.is_alive()
            arrives.release()
            assert decode is last or received(decode), decode.reason
        end.join(5.0)
        assert not end.is_alive() and not any(end.is_closed for end in tubes.ends)


def kv_receiver(peers: Cluster, request: DecodeRequest | None) -> ZmqKVReceiver:
    """SGLang's receiver of that request; without one, of a request that waits for memory."""
    receiver = object.__new__(ZmqKVReceiver)
    failures: dict[int, str] = {}
    receiver.kv_mgr = SimpleNamespace(  # type: ignore[assignment]
        decode_endpoint=peers.receiver,
        failure_records=failures,
        record_failure=failures.__setitem__,
        update_status=lambda request, status: None,
        prefill_info_table={"127.0.0.1:1": None},
        addr_to_rooms_tracker={"127.0.0.1:1": set()},
        request_status={},
        required_prefill_response_num_table={},
        prefill_response_tracker={},
        reasons=Reasons(None),
        defer_decode_allocation=False,
        enable_deferred_decode_kv_release=False,
        connection_lock=threading.Lock(),
        connection_pool={},
        waiting_timeout=30.0,
    )
    receiver._connection_pool_entries = {}
    receiver.bootstrap_room, receiver.bootstrap_addr, receiver.bootstrap_infos = 1, "127.0.0.1:1", []
    receiver.conclude_state, receiver.abort_notified, receiver._has_ended, receiver._request = (
        None,
        False,
        False,
        request,
    )
    receiver._cause, receiver._lost, receiver.init_time = Cause.GIVEN_UP, None, None
    return receiver


def test_sglang_hears_of_a_failure_when_nothing_comes_any_more() -> None:
    """It frees the pages then. Its thread waits for nothing meanwhile."""
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        tubes.before_arrival = lambda: False
        decode, transfer = opened(peers, 1)
        receiver = kv_receiver(peers, decode)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert wait_for(lambda: decode.is_arriving)
        started = time.monotonic()
        receiver.abort()
        assert receiver.poll() == KVPoll.WaitingForInput and time.monotonic() - started < endpoint.ARRIVAL_GRACE_S / 2
        assert wait_for(lambda: transfer.state is TransferState.FAILED) and transfer.reason == "Aborted by AbortReq."
        tubes.before_arrival = lambda: True
        assert wait_for(lambda: receiver.poll() == KVPoll.Failed)
        assert not decode.is_arriving


def test_a_request_that_fails_while_it_waits_for_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Cause] = []
    with cluster() as peers:
        monkeypatch.setattr(peers.receiver.observer, "failed", lambda room, cause, reason: counted.append(cause))
        receiver = kv_receiver(peers, None)
        receiver.kv_mgr.forget_prefill = lambda address: None  # type: ignore[method-assign]
        receiver._lose_ranks(Failure("Lost the connection to prefill rank 0.", Cause.LOST))
        assert receiver.conclude_state is None
        assert [receiver.poll(), receiver.poll()] == [KVPoll.Failed] * 2
        with pytest.raises(KVTransferError, match="Lost the connection"):
            receiver.failure_exception()
    assert counted == [Cause.LOST]


@pytest.mark.parametrize(("status", "cause"), [(KVPoll.WaitingForInput, Cause.TIMEOUT), (KVPoll.Failed, Cause.LOST)])
def test_what_sglang_fails_is_counted_under_its_cause(
    status: int, cause: Cause, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its time for a transfer, or when its own heartbeat misses the prefill server."""
    counted: list[Cause] = []
    with cluster() as peers:
        monkeypatch.setattr(peers.receiver.observer, "failed", lambda room, cause, reason: counted.append(cause))
        receiver = kv_receiver(peers, peers.ask(1, EIGHT))
        receiver.kv_mgr.check_status = lambda room: status  # type: ignore[method-assign]
        receiver.kv_mgr.failure_records = {1: "Lost connection with prefill instance."}
        receiver.kv_mgr.waiting_timeout, receiver.init_time = 0, 0.0
        assert receiver.poll() == KVPoll.Failed
    assert counted == [cause]


def test_a_closed_request_has_nothing_come_straight_to_its_pages() -> None:
    with connected(tubes=Tubes()) as peers:
        decode, transfer = opened(peers, 1)
        (peer,) = peers.receiver._peers.values()
        decode.closed = True  # while it is taken for open
        assert not decode.begin_arrival() and decode.wait_for_arrivals(0.0)
        block = Block(0, 6, 0, 8)
        before = rows(peers.pool, EIGHT)
        sending, fetches = half_of(peers.senders[0], NcclSend), half_of(peer, NcclReceive).fetcher
        held = sending.channel(transfer.peer).hold(range(1), block, np.arange(8))
        sending.held(transfer)[block] = held
        peers.receiver.call(partial(fetches.add, fetcher.Fetch(decode, 0, block, held.num_bytes)))
        assert wait_for(lambda: not sending.held(transfer) and not fetches.is_busy)
        assert rows(peers.pool, EIGHT) == before


class FakeCommunicator:
    """Of `NcclReceiver`: what it is asked to receive, and a GPU that has it when `arrives` is set."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.arrives = threading.Event()
        self.is_closed = False
        self.error: Exception | None = None
        self.stream = SimpleNamespace(synchronize=self.arrives.wait)

    def receive(self, address: int, num_bytes: int) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append(num_bytes)

    def hurry(self) -> None:
        pass

    def abort(self) -> None:
        self.is_closed = True
        self.arrives.set()


@pytest.fixture
def nccl_receiver(monkeypatch: pytest.MonkeyPatch) -> NcclReceiver:
    """With a communicator that is not there, and no GPU."""
    channel = object.__new__(NcclReceiver)
    channel._communicator = FakeCommunicator()  # type: ignore[assignment]
    event = SimpleNamespace(record=lambda stream: None, synchronize=channel._communicator.arrives.wait)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    channel._device, channel._slots = torch.device("cpu"), torch.zeros(channels.NUM_SLOTS, 8)
    channel._is_closed = channel._has_failed = False
    channel._until_abort, channel.errors = [], []  # type: ignore[attr-defined]
    channel._on_error = channel.errors.append  # type: ignore[attr-defined]
    channel._calls, channel._waits = Worker("test-calls"), Worker("test-waits")
    channel._copies = SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]
    return channel


def receive(channel: NcclReceiver) -> tuple[list[str], list[bool]]:
    queued: list[str] = []
    over: list[bool] = []
    channel.receive(0, 8, None, lambda: queued.append("queued"), over.append)
    return queued, over


def test_a_block_is_over_when_it_has_arrived(nccl_receiver: NcclReceiver) -> None:
    queued, over = receive(nccl_receiver)
    assert wait_for(lambda: queued == ["queued"]) and not over
    nccl_receiver._communicator.arrives.set()  # type: ignore[attr-defined]
    assert wait_for(lambda: over == [True])
    nccl_receiver.close()
    assert wait_for(lambda: not any(thread.name.startswith("test-") for thread in threading.enumerate()))


def test_a_block_is_over_when_its_channel_has_been_aborted(nccl_receiver: NcclReceiver) -> None:
    queued, over = receive(nccl_receiver)
    assert wait_for(lambda: bool(queued)) and not over
    nccl_receiver.close()
    assert wait_for(lambda: over == [False])


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_receive_that_fails_is_over_when_its_channel_has_been_aborted(
    has_gpu: bool, nccl_receiver: NcclReceiver
) -> None:
    """NCCL may have begun it. Also when CUDA only has errors any more."""
    first = receive(nccl_receiver)
    assert wait_for(lambda: bool(first[0]))
    nccl_receiver._communicator.error = ChannelError("NCCL has not finished a call within 2 s")  # type: ignore[attr-defined]
    if not has_gpu:
        nccl_receiver._copies.synchronize = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    seconds = [receive(nccl_receiver) for _ in range(2)]
    assert wait_for(lambda: bool(nccl_receiver.errors))  # type: ignore[attr-defined]
    time.sleep(0.02)
    assert not first[1] and not any(over for _, over in seconds)
    nccl_receiver.close()
    assert wait_for(lambda: all(over == [False] for _, over in (first, *seconds)))
    assert nccl_receiver.errors == ["NCCL has not finished a call within 2 s"]  # type: ignore[attr-defined]
    assert not any(queued for queued, _ in seconds)
