"""What SGLang asks of a request's sender and receiver alike: how far it is, and why it has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import KVTransferError

from sglang_apb.transfer.observer import Cause, Failure

if TYPE_CHECKING:
    from sglang_apb.transfer.sglang.manager import ZmqKVManager


class Polled:
    """One request on one rank of this `side`. `bootstrap_room` is its key in SGLang's dictionaries.

    A subclass says what the transfer has come to (`_poll_transfer`, which keeps what is final as `conclude_state`), and
    ends it (`_end`).
    """

    side: str
    kv_mgr: ZmqKVManager
    bootstrap_room: int
    conclude_state: int | None
    _cause = Cause.GIVEN_UP
    _has_told = False

    if TYPE_CHECKING:

        def clear(self) -> None: ...  # SGLang's

    def poll(self) -> int:
        status = self._poll_transfer() if self.conclude_state is None else self.conclude_state
        if status != KVPoll.Failed:
            return status
        if not self._has_told:
            self._has_told = True
            own = self._own_failure()
            if own is not None:
                self.kv_mgr.reasons.tell(int(self.bootstrap_room), own)
            self._hear_of_failure(own)
        # SGLang frees the pages when it hears of it.
        return KVPoll.WaitingForInput if self._is_arriving else status

    def failure_exception(self) -> None:
        """Ends the request, and raises why it has failed: here, or else on another rank of this server."""
        self.conclude_state = KVPoll.Failed
        own = self._own_failure()
        self.kv_mgr.failure_records.pop(self.bootstrap_room, None)
        elsewhere = Failure(f"The request failed on another {self.side} rank.")
        failure = own or self.kv_mgr.reasons.find(int(self.bootstrap_room)) or elsewhere
        self._end(failure)
        self.clear()
        raise KVTransferError(int(self.bootstrap_room), failure.reason, is_from_another_rank=not own)

    def _poll_transfer(self) -> int:
        raise NotImplementedError

    def _end(self, failure: Failure) -> None:
        """Nothing is sent or asked for any more. May be called again."""
        raise NotImplementedError

    def _hear_of_failure(self, own: Failure | None) -> None:
        """At the first poll that says so; None if it did not fail on this rank."""

    @property
    def _is_arriving(self) -> bool:
        """Whether something may still be written into the request's pages."""
        return False

    def _own_failure(self) -> Failure | None:
        """None if it did not fail on this rank."""
        reason = self.kv_mgr.failure_records.get(self.bootstrap_room)
        return Failure(reason, self._cause) if reason else None
