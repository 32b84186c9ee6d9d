"""SGLang's KV receiver: one request on one decode rank. Called by the scheduler's thread only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferDestination
from sglang.srt.disaggregation.common.conn import CommonKVReceiver

from sglang_apb.transfer.decode.endpoint import Expected, UnknownKeyError
from sglang_apb.transfer.decode.request import DecodeRequest, RequestState
from sglang_apb.transfer.memory.heads import Shares
from sglang_apb.transfer.observer import Cause, Failure
from sglang_apb.transfer.planes.table import ZMQ
from sglang_apb.transfer.protocol.hosts import Address
from sglang_apb.transfer.protocol.room_number import RoomKey, digest_of, why_no_room
from sglang_apb.transfer.sglang.manager import ZmqKVManager
from sglang_apb.transfer.sglang.polled import Polled
from sglang_apb.transfer.sglang.wall import walled


@walled(
    *("__init__", "init", "set_prompt", "send_metadata", "clear", "abort", "ensure_abort_notified"),
    poll=KVPoll.Failed,
)
class ZmqKVReceiver(Polled, CommonKVReceiver):
    """After Success, `prefill_info` is what the sender's `set_prefill_info` said. Until then it is the prefill server's
    layout: SGLang keeps that under this name, and reads it before the transfer only.
    """

    side = "decode"
    kv_mgr: ZmqKVManager

    def __init__(self, mgr: ZmqKVManager, bootstrap_addr: str, bootstrap_room: int):
        self.kv_mgr, self.bootstrap_room = mgr, RoomKey.of(bootstrap_room)
        self._request: DecodeRequest | None = None
        self._expected: Expected | None = None
        self._shares: Shares | None = None
        self._prompt = b""
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
        return self._request.assembly.num_bytes if self._request else 0

    @property
    def num_hidden_bytes(self) -> int:
        """KV bytes that the ranks had sent before their prefill ended."""
        return self._request.assembly.num_hidden_bytes if self._request else 0

    @property
    def data_plane(self) -> str:
        """How the pages came: zmq, cuda_ipc or nccl."""
        return self._request.data_plane if self._request else ZMQ

    @property
    def seconds(self) -> float:
        """From the first byte to the last; 0 before that."""
        return self._request.seconds if self._request else 0.0

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
            self._expected = self.kv_mgr.decode_endpoint.expect(number, self._ranks(), self._lose_ranks, shares.asker)
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
            self._request = self.kv_mgr.decode_endpoint.open(
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

    def _poll_transfer(self) -> int:
        if self._lost is not None:
            self._fail(*self._lost)
            return KVPoll.Failed
        status = self.kv_mgr.check_status(self.bootstrap_room)
        if status == KVPoll.Failed:
            self._cause = Cause.LOST  # by SGLang's heartbeat; whatever else fails it has an end here
            gone = f"SGLang has no record of bootstrap room {self.bootstrap_room} any more."
            self.kv_mgr.failure_records.setdefault(self.bootstrap_room, gone)
        elif self._request is not None:
            status = self._poll_request(self._request)
        if status in (KVPoll.Success, KVPoll.Failed):
            self.conclude_state = status
        return status

    def clear(self) -> None:
        if self._request is not None:  # first, whatever becomes of SGLang's part: the pages are freed next
            self.kv_mgr.decode_endpoint.close(self._request)
        elif self._expected is not None:
            self.kv_mgr.decode_endpoint.expect_no_more(self._expected)
        super().clear()
        if not self.kv_mgr.addr_to_rooms_tracker.get(self.bootstrap_addr):
            self.kv_mgr.addr_to_rooms_tracker.pop(self.bootstrap_addr, None)  # clients name what address they like

    def abort(self) -> None:
        super().abort()
        if self.bootstrap_addr not in self.kv_mgr.prefill_info_table:
            self._cause = Cause.LOST
            reason = f"The prefill server at {self.bootstrap_addr} does not answer."
            self.kv_mgr.record_failure(self.bootstrap_room, reason)

    def _poll_request(self, request: DecodeRequest) -> int:
        if request.state is RequestState.COMPLETE:
            self.prefill_info = request.assembly.info
            return KVPoll.Success
        if request.state is RequestState.FAILED:
            self._fail(request.reason, request.cause)
            if request.lost_rank:
                self.kv_mgr.forget_prefill(self.bootstrap_addr)
            return KVPoll.Failed
        timed_out = self._check_waiting_timeout()
        return KVPoll.WaitingForInput if timed_out is None else timed_out

    def _lose_ranks(self, failure: Failure) -> None:
        """A prefill rank is gone, or has refused, while this request waits for KV memory. In the endpoint's thread."""
        if failure.cause is Cause.LOST:
            self.kv_mgr.forget_prefill(self.bootstrap_addr)
        self._lost = failure

    def _end(self, failure: Failure) -> None:
        """Nothing is asked for any more; counted once."""
        if self._request is not None:
            self.kv_mgr.decode_endpoint.give_up(self._request, *failure)
        elif not self._has_ended:
            self.kv_mgr.decode_endpoint.observer.failed(int(self.bootstrap_room), failure.cause, failure.reason)
        self._has_ended = True

    def _hear_of_failure(self, own: Failure | None) -> None:
        self._end(own or Failure(""))

    @property
    def _is_arriving(self) -> bool:
        return self._request is not None and self._request.is_arriving

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
        if self._request is not None:
            self.kv_mgr.decode_endpoint.give_up(self._request, reason, self._cause)
        elif self._expected is not None:  # else the room, at the prefill ranks, may be another request's
            asker = self._shares.asker if self._shares else 0
            self.kv_mgr.decode_endpoint.expect_no_more(self._expected)
            self.kv_mgr.decode_endpoint.refuse(int(self.bootstrap_room), self._ranks(), reason, asker=asker)

    def _get_bootstrap_info_from_server(self, prefill_dp_rank: int, *ranks: Any) -> None:
        """SGLang would ask the server, and have the scheduler wait. The directory has found all there are: a rank that
        is missing is not there, or the server has been forgotten meanwhile. Clients may name one that never was.
        """
        info = self.kv_mgr.prefill_info_table.get(self.bootstrap_addr)
        if info is None or prefill_dp_rank in range(info.dp_size):
            self.kv_mgr.forget_prefill(self.bootstrap_addr)
