"""What hooks tell the transfer of a request, and when; and what they charge for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang_apb.patches import insides, pd_decode, pd_prefill, scheduling

from sglang_apb.backends.base import KeptTokens, Wish
from sglang_apb.layout import Span
from sglang_apb.requests import Notes

REPORT = {"method": "apb", "num_ranks": 2, "attention_share": 0.25}


class Sender:
    """The parts of our KV sender that hooks call."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def set_owned_pages(self, pages: list[tuple[int, int]]) -> None:
        self.told.append(pages)

    def set_prefill_info(self, info: dict[str, int | str]) -> None:
        self.told.append(info)

    def refuse(self, reason: str) -> None:
        self.told.append(reason)


def request(sender: Any, **notes: Any) -> Any:
    return SimpleNamespace(
        disagg_kv_sender=sender,
        prefill_notes=Notes(is_decided=True, **notes),
        finished_reason=None,
        to_finish=None,
        customized_info=None,
        skip_radix_cache_insert=False,
        rid="r",
    )


def test_owned_pages_are_told_with_the_sender_before_any_batch() -> None:
    """SGLang sends a cached prefix before the request's own batch."""
    req = request(Sender(), owned_pages=[(0, 3), (7, 9)])
    pd_prefill._tell_owned_pages(True, None, req, 8)
    assert req.disagg_kv_sender.told == [[(0, 3), (7, 9)]] and insides.notes_of(req).report is None


@pytest.mark.parametrize("sender", [None, SimpleNamespace()], ids=["none, too long", "SGLang's fake one"])
def test_nothing_is_told_without_a_sender_of_ours(sender: Any) -> None:
    req = request(sender, owned_pages=[(0, 1)], report=REPORT)
    req.to_finish = FINISH_ABORT("gone")
    pd_prefill._tell_owned_pages(True, None, req, 8)
    pd_prefill._tell_report(None, req, last_chunk=True)
    pd_prefill._tell_reason(None, req)


def test_an_exact_prompt_leaves_the_pages_to_sglangs_split() -> None:
    req = request(Sender())
    pd_prefill._tell_owned_pages(True, None, req, 8)
    assert req.disagg_kv_sender.told == []


def test_the_report_goes_with_the_last_pages() -> None:
    req = request(Sender(), report=REPORT)
    pd_prefill._tell_report(None, req, last_chunk=False, end_idx=512)
    assert req.disagg_kv_sender.told == [] and req.customized_info is None
    pd_prefill._tell_report(None, req, last_chunk=True)
    assert req.disagg_kv_sender.told == [REPORT | {"attention_share": "0.25"}]
    assert req.customized_info == {"prefill": [REPORT]}


def test_a_prompt_that_was_given_up_says_why() -> None:
    req = request(Sender())
    pd_prefill._tell_reason(None, req)
    assert req.disagg_kv_sender.told == []
    req.to_finish = FINISH_ABORT("The prompt does not fit.")
    pd_prefill._tell_reason(None, req)
    assert req.disagg_kv_sender.told == ["The prompt does not fit."]


@pytest.mark.parametrize(("share", "kept"), [("0.25", 0.25), ("a quarter", "a quarter"), (None, None)])
def test_a_report_that_cannot_be_read_is_passed_on(share: str | None, kept: Any) -> None:
    """It is another server's; the KV is here all the same."""
    receiver = SimpleNamespace(
        prefill_info={"method": "apb"} | ({"attention_share": share} if share else {}),
        kv_mgr=SimpleNamespace(attn_tp_size=1),
        num_bytes=1,
        num_hidden_bytes=0,
        data_plane="zmq",
    )
    req = request(None)
    pd_decode._keep_report(None, SimpleNamespace(kv_receiver=receiver, req=req))
    assert req.customized_info["prefill"][0].get("attention_share") == kept


@pytest.mark.parametrize(("method", "is_kept_out"), [("apb", True), ("exact", False)])
def test_sparse_kv_stays_out_of_decodes_prefix_cache(method: str, is_kept_out: bool) -> None:
    """It depends on the question: another one about the same document would decode over it."""
    receiver = SimpleNamespace(
        prefill_info={"method": method},
        kv_mgr=SimpleNamespace(attn_tp_size=1),
        num_bytes=1,
        num_hidden_bytes=0,
        data_plane="zmq",
    )
    req = request(None)
    pd_decode._keep_report(None, SimpleNamespace(kv_receiver=receiver, req=req))
    assert req.skip_radix_cache_insert == is_kept_out and req.customized_info["prefill"][0]["method"] == method


@pytest.mark.parametrize("is_admitted", [True, False])
def test_tokens_that_other_ranks_keep_are_not_charged(is_admitted: bool) -> None:
    kept = KeptTokens(1000, (Span(0, 450),), 480, Span(900, 1000))
    req = request(None, wish=Wish(), kept=kept)
    adder = SimpleNamespace(
        can_run_list=[], memory_budget=SimpleNamespace(total_offset=50, current_offset=20), rem_chunk_tokens=512
    )

    def add(self: Any, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> str:
        assert self.rem_chunk_tokens is None  # it is not cut
        self.memory_budget.total_offset += 1000
        self.memory_budget.current_offset += 1000
        if is_admitted:
            self.can_run_list.append(req)
        else:
            self.memory_budget.total_offset -= 1000
            self.memory_budget.current_offset -= 1000
        return "done"

    assert scheduling._add_alone_and_whole(add, adder, req, False, None) == "done"
    charged = kept.num_slots if is_admitted else 0
    assert (adder.memory_budget.total_offset, adder.memory_budget.current_offset) == (50 + charged, 20 + charged)
    assert adder.rem_chunk_tokens == 512
