"""What hooks tell the transfer of a request, and when; and what they charge for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang_apb.patches import door, insides, pd_decode, pd_prefill, pd_prompt, pd_refusal

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
        finished=lambda: False,
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


class Receiver:
    def __init__(self) -> None:
        self.prompt: list[int] | None = None

    def set_prompt(self, token_ids: list[int]) -> None:
        self.prompt = token_ids


@pytest.mark.parametrize(("is_rebootstrap", "prompt"), [(False, [5, 6]), (True, None)])
def test_decode_says_which_prompt_it_waits_for(is_rebootstrap: bool, prompt: list[int] | None) -> None:
    """A request that is begun anew has what it had said in prefill's prompt."""
    req, receiver = request(None), Receiver()
    req.origin_input_ids = [5, 6]
    decode_req = SimpleNamespace(kv_receiver=receiver, req=req)
    pd_prompt._tell_receiver(decode_req, None, req, is_rebootstrap)
    assert receiver.prompt == prompt


def test_prefill_says_which_prompt_it_has() -> None:
    sender = Sender()
    sender.set_prompt = sender.told.append  # type: ignore[attr-defined]
    req = request(sender)
    req.origin_input_ids = [5, 6]
    pd_prompt._tell_sender(True, None, req, 8)
    assert sender.told == [[5, 6]]
    refused = request(sender)
    refused.to_finish = FINISH_ABORT("The prompt does not fit.")  # SGLang has put another prompt in its place
    pd_prompt._tell_sender(True, None, refused, 8)
    pd_prompt._tell_sender(True, None, request(None), 8)  # SGLang's fake sender, of its health checks
    assert sender.told == [[5, 6]]


def test_schedulers_hear_of_rooms_that_the_door_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    tokenizer_manager = SimpleNamespace(_dispatch_to_scheduler=sent.append)
    hosts: Any
    for rooms, hosts in ((70, "a"), ([71, 72], ["b", "c"]), (73, None), (None, "a"), ("x", "a")):
        request = SimpleNamespace(bootstrap_room=rooms, bootstrap_host=hosts, bootstrap_port=8998)
        door.refuse_rooms(tokenizer_manager, request, "too long")
    door.refuse_rooms(tokenizer_manager, SimpleNamespace(), "no embeddings here")
    assert [door.refused_room(message) for message in sent] == [
        door.RefusedRoom(number, host, 8998, "too long") for number, host in ((70, "a"), (71, "b"), (72, "c"), (73, ""))
    ]
    refused: list[Any] = []
    aborted: list[Any] = []
    endpoint = SimpleNamespace(refuse=lambda *what: refused.append(what))
    manager = SimpleNamespace(prefill_endpoint=endpoint, refuse_room=lambda *what: refused.append(what))
    queue = SimpleNamespace(kv_manager=manager)
    scheduler = SimpleNamespace(disagg_prefill_bootstrap_queue=queue, disagg_decode_prealloc_queue=queue)
    for half in ("prefill", "decode"):
        monkeypatch.setattr(insides, "pair_half", lambda half=half: half)
        for message in (sent[0], AbortReq(rid="r"), AbortReq(abort_all=True)):
            pd_refusal._tell_other_server(lambda self, abort: aborted.append(abort.rid), scheduler, message)
    assert refused == [(70, "too long"), ("a:8998", 70, "too long")] and aborted == ["r", ""] * 2
