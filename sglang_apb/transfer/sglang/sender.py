"""SGLang's KV sender: one request on one prefill rank. Called by the scheduler's thread only."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferMetric
from sglang.srt.disaggregation.common.conn import CommonKVSender
from sglang.srt.disaggregation.utils import _get_cp_rank_page_bounds

from sglang_apb.transfer.memory.pages import PageIdsLater
from sglang_apb.transfer.observer import Cause, Failure
from sglang_apb.transfer.prefill.request import PrefillRequest
from sglang_apb.transfer.prefill.transfer import IsFinal, TransferState, always
from sglang_apb.transfer.protocol import ownership
from sglang_apb.transfer.protocol.ownership import PageRange
from sglang_apb.transfer.protocol.room_number import RoomKey, digest_of
from sglang_apb.transfer.protocol.wire import check_info
from sglang_apb.transfer.sglang.manager import ZmqKVManager
from sglang_apb.transfer.sglang.polled import Polled
from sglang_apb.transfer.sglang.wall import walled

_POLL = {
    TransferState.UNASKED: KVPoll.Bootstrapping,
    TransferState.ASKED: KVPoll.WaitingForInput,
    TransferState.DONE: KVPoll.Success,
    TransferState.FAILED: KVPoll.Failed,
}


@walled(
    *("__init__", "init", "set_prompt", "send", "stream_layer", "refuse", "clear", "abort"),
    poll=KVPoll.Failed,
    pop_decode_prefix_len=0,
    get_transfer_metric=KVTransferMetric(),
)
class ZmqKVSender(Polled, CommonKVSender):
    side = "prefill"
    kv_mgr: ZmqKVManager
    num_kv_indices: int
    curr_idx: int
    conclude_state: int | None
    init_time: float

    def __init__(
        self,
        mgr: ZmqKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ):
        self.kv_mgr, self.bootstrap_room = mgr, RoomKey.of(bootstrap_room)
        self._owned: tuple[PageRange, ...] | None = None
        self._info: dict[str, int | str] = {}
        self._prompt = b""
        self._prefix_pages = 0
        self._announced = False
        self._sent_to: dict[int, int] = {}  # of each layer, the pages before this one
        self._last_send = 0.0
        self._request = PrefillRequest(mgr.prefill_endpoint, bootstrap_room)
        super().__init__(mgr, bootstrap_addr, self.bootstrap_room, req_has_disagg_prefill_dp_rank)
        self.init_time = time.time()

    @property
    def num_bytes(self) -> int:
        """KV bytes that this rank has sent."""
        return self._request.num_bytes

    @property
    def seconds(self) -> float:
        """From the first `send` to the decode server's "done"; 0 before that."""
        return self._request.seconds

    def set_owned_pages(self, ranges: Sequence[PageRange]) -> None:
        """Says that this rank holds page ranges [start, end) of the request; before its first `send`.

        Pages count from the request's first token. Across the ranks the ranges must partition the request;
        a rank may hold none. Without this call every rank sends its part of SGLang's contiguous split.
        Raises ValueError when ranges overlap, and RuntimeError after the first `send`.
        """
        if self._announced:
            raise RuntimeError("set_owned_pages must be called before the request's first send.")
        self._owned = ownership.check_ranges(ranges, max((end for _, end in ranges), default=0))

    def set_prompt(self, token_ids: Sequence[int]) -> None:
        """Says which prompt it is, before the first `send`: a decode server that waits with another one, in the same
        room, does not get its KV.
        """
        self._prompt = digest_of(token_ids)

    def set_prefill_info(self, info: Mapping[str, int | str]) -> None:
        """Facts about the prefill for the decode server: at most 16 short strings or integers.

        Raises ValueError when there are more, or one is of another type or too long.
        """
        self._info = check_info(info)

    def refuse(self, reason: str) -> None:
        """Fails the request on both servers, with `reason` for the client: its KV will not come."""
        self._fail(reason)

    def pop_decode_prefix_len(self) -> int:
        """Tokens that the decode server has in its cache already: whole pages, which are not sent."""
        prefix_tokens = next((ask.prefix_tokens for ask in self._request.asks), 0)
        self._prefix_pages = prefix_tokens // self.kv_mgr.kv_args.page_size
        return prefix_tokens

    def stream_layer(self, layer: int, page_ids: PageIdsLater, num_pages: int, is_final: IsFinal = always) -> None:
        """Queues this rank's part of `layer` in the next pages of the request, before the prefill has ended.

        `page_ids` gives the pool's `num_pages` pages behind those that a `send` has had; it is called, and the pool
        read, once `is_final` says that the layer's KV is written. What is not streamed leaves with the pages' `send`.
        Call it after `set_owned_pages`.
        """
        if not self._can_send():
            return
        first = self.curr_idx
        for start, end in ownership.clip(self._announce(), self._unsent(layer, (first, first + num_pages))):
            ids = partial(_part, page_ids, (start - first, end - first))
            self._request.send_pages((start, end), ids, [layer], is_final)
        self._sent_to[layer] = first + num_pages

    def send(
        self,
        kv_indices: npt.NDArray[np.int32],
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
        indices_event: Any = None,
    ) -> None:
        """Queues this rank's part of the request's next pages, `kv_indices` in the pool, which are final."""
        if not self._can_send():
            return
        first, self.curr_idx = self.curr_idx, self.curr_idx + len(kv_indices)
        is_final = self._take_is_final()
        if is_last := self.curr_idx == self.num_kv_indices:
            self._request.end_prefill()
        owned, unsent = self._announce(), defaultdict(list)
        for layer in range(self.kv_mgr.num_layers):
            unsent[self._unsent(layer, (first, self.curr_idx))].append(layer)
        for pages, layers in unsent.items():
            for start, end in ownership.clip(owned, pages):
                ids = kv_indices[start - first : end - first].astype(np.int64)
                self._request.send_pages((start, end), partial(_same, ids), layers, is_final)
        if is_last:
            aux_index = self.aux_index if self.kv_mgr.attn_cp_rank == 0 and self._share()[0] == 0 else None
            self._request.finish(aux_index, self._info)
        self._last_send = time.time()

    def _poll_transfer(self) -> int:
        if self.kv_mgr.request_status.get(self.bootstrap_room) == KVPoll.Failed:
            return KVPoll.Failed
        self._request.wait_for_others()
        status = _POLL[self._request.state]
        if status == KVPoll.Bootstrapping and (self._was_left_alone() or self._check_bootstrap_timeout() is not None):
            self._cause = Cause.TIMEOUT
            return KVPoll.Failed
        if status == KVPoll.WaitingForInput and self._announced:
            status = self._check_transfer_timeout()
        if status in (KVPoll.Success, KVPoll.Failed):
            self.conclude_state = status
        return status

    def clear(self) -> None:
        self._request.close("")  # first, whatever becomes of SGLang's part: the pages are freed next
        super().clear()

    def abort(self) -> None:
        self._request.close("The request was aborted on the prefill server.")
        super().abort()

    def get_transfer_metric(self) -> KVTransferMetric:
        return KVTransferMetric(transfer_latency_s=self.seconds, transfer_total_bytes=self.num_bytes)

    def _can_send(self) -> bool:
        return self._request.is_sending and self._check_num_pages()

    def _unsent(self, layer: int, pages: PageRange) -> PageRange:
        start, end = pages
        return min(max(start, self._sent_to.get(layer, 0)), end), end

    def _announce(self) -> list[PageRange]:
        """The pages that this rank sends; the decode server hears of them first."""
        owned = self._owned_of_sent()
        if not self._announced:
            self._announced = True
            self._last_send = time.time()
            self._request.announce(owned)
        return owned

    def _owned_of_sent(self) -> list[PageRange]:
        """The owned ranges, counted from the first page that is sent (after the decode server's prefix)."""
        if self._owned is None:
            rank, num_ranks = self.kv_mgr.attn_cp_rank, self.kv_mgr.attn_cp_size
            owned = [_get_cp_rank_page_bounds(self.num_kv_indices, rank, num_ranks)]
        else:
            owned = ownership.clip(ownership.shift(self._owned, -self._prefix_pages), (0, self.num_kv_indices))
        return ownership.share(owned, *self._share())

    def _share(self) -> tuple[int, int]:
        """Of the ranks with the same heads that one decode rank asks. All that ask this rank say the same."""
        return next((ask.share for ask in self._request.asks), (0, 1))

    def _check_num_pages(self) -> bool:
        asks = self._request.asks
        asked = next((ask.num_pages for ask in asks if ask.num_pages != self.num_kv_indices), None)
        if len({ask.prefix_tokens for ask in asks}) > 1:
            self._fail("The decode server's ranks have different parts of the prompt in their caches.")
            return False
        if self._prompt and any(ask.prompt not in (b"", self._prompt) for ask in asks):
            self._fail(
                f"Two requests have bootstrap room {self.bootstrap_room}, this one here and another one on the decode "
                "server: every request needs its own.",
                Cause.MISFIT,
            )
            return False
        if asked is None:
            return True
        self._fail(
            f"The prompt has {self.num_kv_indices} pages to send on the prefill server, the decode server "
            f"waits for {asked}: start both with the same model, tokenizer and chat template.",
            Cause.MISFIT,
        )
        return False

    def _was_left_alone(self) -> bool:
        """A decode server speaks of a request as soon as its scheduler sees it, long before it has memory for it."""
        seconds = self.kv_mgr.contact_seconds
        if self._request.has_contact or time.time() - self.init_time < seconds:
            return False
        self._fail(
            f"No decode server has spoken of the request for {seconds:g} s: is it running and not stuck?", Cause.TIMEOUT
        )
        return True

    def _check_transfer_timeout(self) -> int:
        if time.time() - self._last_send < self.kv_mgr.bootstrap_timeout:
            return KVPoll.Transferring
        self._fail(
            f"The decode server has not confirmed the request's KV for {self.kv_mgr.bootstrap_timeout} s "
            f"(SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT).",
            Cause.TIMEOUT,
        )
        return KVPoll.Failed

    def _fail(self, reason: str, cause: Cause = Cause.GIVEN_UP) -> None:
        self.kv_mgr.record_failure(self.bootstrap_room, reason)
        self.conclude_state, self._cause = KVPoll.Failed, cause
        self._request.close(reason, cause)

    def _end(self, failure: Failure) -> None:
        self._request.close(*failure)

    def _own_failure(self) -> Failure | None:
        return super()._own_failure() or self._request.failure

    def _take_is_final(self) -> IsFinal:
        """SGLang sends a cached prefix before the batch that may be writing it has ended, with this event."""
        event = self.__dict__.pop("_early_send_wait_event", None)
        return always if event is None else event.query


def _part(page_ids: PageIdsLater, pages: PageRange) -> npt.NDArray[np.int64]:
    return page_ids()[slice(*pages)]


def _same(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return ids
