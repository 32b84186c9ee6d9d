"""SGLang's KV receiver: one request on one decode rank. Called by the scheduler's thread only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferDestination
from sglang.srt.disaggregation.common.conn import CommonKVReceiver, KVTransferError

from sglang_apb.transfer.config import ZMQ
from sglang_apb.transfer.heads import Shares
from sglang_apb.transfer.hosts import Address
from sglang_apb.transfer.inbox import ReceiveRoom, ReceiveState
from sglang_apb.transfer.manager import ZmqKVManager
from sglang_apb.transfer.observer import Cause, Failure
from sglang_apb.transfer.receiving import Expected, UnknownKeyError
from sglang_apb.transfer.room_number import RoomKey, digest_of, why_no_room
from sglang_apb.transfer.wall import walled

_ON_ANOTHER_RANK = Failure("The request failed on another decode rank.")


@walled(
    *("__init__", "init", "set_prompt", "send_metadata", "clear", "abort", "ensure_abort_notified"),
    poll=KVPoll.Failed,
)
class ZmqKVReceiver(CommonKVReceiver):
    """`bootstrap_room` is this request's key in SGLang's dictionaries.

    After Success, `prefill_info` is what the sender's `set_prefill_info` said. Until then it is the prefill server's
    layout: SGLang keeps that under this name, and reads it before the transfer only.
    """

    kv_mgr: ZmqKVManager
    conclude_state: int | None

    def __init__(self, mgr: ZmqKVManager, bootstrap_addr: str, bootstrap_room: int):
        self.kv_mgr, self.bootstrap_room = mgr, RoomKey.of(bootstrap_room)
        self._room: ReceiveRoom | None = None
        self._expected: Expected | None = None
        self._shares: Shares | None = None
        self._prompt = b""
        self._cause = Cause.GIVEN_UP
        self._lost: Failure | None = None
        self._has_ended = False
        super().__init__(mgr, bootstrap_addr, self.bootstrap_room)
        if why := why_no_room(bootstrap_room):
            self._fail(why, Cause.ERROR)

    def set_prompt(self, token_ids: Sequence[int]) -> None:
        """Says which prompt it is, before `send_metadata`: the prefill server refuses the room of another one."""
        self._prompt = digest_of(token_ids)

    @property
    def num_bytes(self) -> int:
        """KV bytes that have arrived, of all ranks."""
        return self._room.assembly.num_bytes if self._room else 0

    @property
    def num_hidden_bytes(self) -> int:
        """KV bytes that the ranks had sent before their prefill ended."""
        return self._room.assembly.num_hidden_bytes if self._room else 0

    @property
    def data_plane(self) -> str:
        """How the pages came: zmq, cuda_ipc or nccl."""
        return self._room.data_plane if self._room else ZMQ

    @property
    def seconds(self) -> float:
        """From the first byte to the last; 0 before that."""
        return self._room.seconds if self._room else 0.0

    def init(self, prefill_dp_rank: int) -> None:
        if self.conclude_state == KVPoll.Failed:
            return
        if refusal := self.kv_mgr.refusals.get(self.bootstrap_addr):
            self.kv_mgr.forget_prefill(self.bootstrap_addr)  # it may have been restarted when the next request comes
            self._fail(refusal, Cause.MISFIT)
            return
        super().init(prefill_dp_rank)
        if self.conclude_state == KVPoll.Failed:
            self._cause = Cause.LOST
        elif self.bootstrap_infos:
            try:
                self._shares = self.kv_mgr.shares(self.prefill_info, [info["tp_rank"] for info in self.bootstrap_infos])
            except ValueError as error:
                self._fail(str(error), Cause.MISFIT)
                return
            self._expect(self._shares)

    def _expect(self, shares: Shares) -> None:
        number = int(self.bootstrap_room)
        try:
            self._expected = self.kv_mgr.receiving.expect(number, self._ranks(), self._lose_ranks, shares.asker)
        except ValueError as error:
            self._fail(str(error), Cause.ERROR)

    def send_metadata(
        self,
        kv_indices: npt.NDArray[np.int32],
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        destination: KVTransferDestination = KVTransferDestination.DEVICE,
        device_kv_indices: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Asks all prefill ranks for the request's KV, which goes to pages `kv_indices` of the pool."""
        if self.bootstrap_infos is None or aux_index is None:
            self._fail(f"Could not find the prefill ranks of {self.bootstrap_addr}.", Cause.ERROR)
            return
        try:
            self._room = self.kv_mgr.receiving.open(
                int(self.bootstrap_room),
                self._ranks(),
                kv_indices.astype(np.int64),
                aux_index,
                decode_prefix_len or 0,
                self._shares,
                expected=self._expected,
                prompt=self._prompt,
            )
        except ValueError as error:
            self._fail(str(error), Cause.MISFIT if isinstance(error, UnknownKeyError) else Cause.ERROR)
            return
        self.init_time = time.time()

    def poll(self) -> int:
        status = self._poll_transfer() if self.conclude_state is None else self.conclude_state
        if status == KVPoll.Failed and not self._has_ended:
            if own := self._own_failure():
                self.kv_mgr.reasons.tell(int(self.bootstrap_room), own)
            self._end(own or Failure(""))
        if status == KVPoll.Failed and self._room is not None and self._room.is_arriving:
            return KVPoll.WaitingForInput  # SGLang frees the pages when it hears of it
        return status

    def _poll_transfer(self) -> int:
        if self._lost is not None:
            self._fail(*self._lost)
            return KVPoll.Failed
        status = self.kv_mgr.check_status(self.bootstrap_room)
        if status == KVPoll.Failed:
            self._cause = Cause.LOST  # by SGLang's heartbeat; whatever else fails it has an end here
            gone = f"SGLang has no record of bootstrap room {self.bootstrap_room} any more."
            self.kv_mgr.failure_records.setdefault(self.bootstrap_room, gone)
        elif self._room is not None:
            status = self._poll_room(self._room)
        if status in (KVPoll.Success, KVPoll.Failed):
            self.conclude_state = status
        return status

    def failure_exception(self) -> None:
        self.conclude_state = KVPoll.Failed
        own = self._own_failure()
        self.kv_mgr.failure_records.pop(self.bootstrap_room, None)
        failure = own or self.kv_mgr.reasons.find(int(self.bootstrap_room)) or _ON_ANOTHER_RANK
        self._end(failure)
        self.clear()
        raise KVTransferError(int(self.bootstrap_room), failure.reason, is_from_another_rank=not own)

    def clear(self) -> None:
        if self._room is not None:
            self.kv_mgr.receiving.close(self._room)  # whatever becomes of SGLang's part: the pages are freed next
        elif self._expected is not None:
            self.kv_mgr.receiving.expect_no_more(self._expected)
        super().clear()
        if not self.kv_mgr.addr_to_rooms_tracker.get(self.bootstrap_addr):
            self.kv_mgr.addr_to_rooms_tracker.pop(self.bootstrap_addr, None)  # clients name what address they like

    def abort(self) -> None:
        super().abort()
        if self.bootstrap_addr not in self.kv_mgr.prefill_info_table:
            self._cause = Cause.LOST
            reason = f"The prefill server at {self.bootstrap_addr} does not answer."
            self.kv_mgr.record_failure(self.bootstrap_room, reason)

    def _poll_room(self, room: ReceiveRoom) -> int:
        if room.state is ReceiveState.COMPLETE:
            self.prefill_info = room.assembly.info
            return KVPoll.Success
        if room.state is ReceiveState.FAILED:
            self._fail(room.reason, room.cause)
            if room.lost_rank:
                self.kv_mgr.forget_prefill(self.bootstrap_addr)
            return KVPoll.Failed
        timed_out = self._check_waiting_timeout()
        return KVPoll.WaitingForInput if timed_out is None else timed_out

    def _lose_ranks(self, failure: Failure) -> None:
        """A prefill rank is gone while this request waits for KV memory. Called by the endpoint's thread."""
        self.kv_mgr.forget_prefill(self.bootstrap_addr)
        self._lost = failure

    def _end(self, failure: Failure) -> None:
        """Nothing is asked for any more; counted once."""
        if self._room is not None:
            self.kv_mgr.receiving.give_up(self._room, *failure)
        elif not self._has_ended:
            self.kv_mgr.receiving.observer.failed(int(self.bootstrap_room), failure.cause, failure.reason)
        self._has_ended = True

    def _own_failure(self) -> Failure | None:
        """None if it did not fail on this rank."""
        reason = self.kv_mgr.failure_records.get(self.bootstrap_room)
        return Failure(reason, self._cause) if reason else None

    def _fail(self, reason: str, cause: Cause) -> None:
        self._cause = cause
        self.kv_mgr.record_failure(self.bootstrap_room, reason)
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
        self.conclude_state = KVPoll.Failed

    def _ranks(self) -> list[Address]:
        return [Address(info["rank_ip"], info["rank_port"], info["key"]) for info in self.bootstrap_infos]

    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        """Called by SGLang on abort, and on timeout, when the request has not ended yet."""
        if self.conclude_state is None:
            self._cause = Cause.TIMEOUT
        reason = self.kv_mgr.failure_records.get(self.bootstrap_room, "The request was aborted.")
        if self._room is not None:
            self.kv_mgr.receiving.give_up(self._room, reason, self._cause)
        elif self._expected is not None:  # else the room, at the prefill ranks, may be another request's
            asker = self._shares.asker if self._shares else 0
            self.kv_mgr.receiving.expect_no_more(self._expected)
            self.kv_mgr.receiving.refuse(int(self.bootstrap_room), self._ranks(), reason, asker=asker)

    def _get_bootstrap_info_from_server(self, prefill_dp_rank: int, *ranks: Any) -> None:
        """SGLang would ask the server, and have the scheduler wait. The directory has found all there are: a rank that
        is missing is not there, or the server has been forgotten meanwhile. Clients may name one that never was.
        """
        info = self.kv_mgr.prefill_info_table.get(self.bootstrap_addr)
        if info is None or prefill_dp_rank in range(info.dp_size):
            self.kv_mgr.forget_prefill(self.bootstrap_addr)
