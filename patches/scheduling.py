"""Target: `Scheduler._add_request_to_queue`.

Reason: before any queue sees a request it is decided how it runs; its batches are formed in rounds.py. In the radix
cache a sparse prompt finds contexts of sparse prompts alone, and where a context's KV depends on the question nothing.
Official points: the request's `extra_key`, `skip_radix_cache_insert`, and a cache of our own (context_cache.py).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from sglang_apb.patches import context_cache, insides, prompt_memory, unit_cache
from sglang_apb.patches._patch import Patch
from sglang_apb.patches.prefill_forward import backend_of

from sglang_apb import capacity, config, requests
from sglang_apb.layout import LayoutError
from sglang_apb.own_slots import OwnSlots

logger = logging.getLogger(__name__)


def _decide(self: Any, req: Any, is_retracted: bool = False) -> None:
    """Notes once, before any queue sees the request, how it runs and what of its KV this rank keeps. What fails in it
    ends the request, on all ranks alike.
    """
    notes = insides.notes_of(req)
    notes.handed_on.clear()  # it may come back from the midst of its rounds
    if is_retracted or notes.is_decided:
        return
    notes.is_decided = True
    if insides.is_ended(req):
        return
    try:
        refusal = _note_way(self, req, notes)
    except requests.RequestError as error:  # from a process that does not check (patches/request_checks.py)
        refusal = str(error)
    except Exception as error:
        logger.exception("request %s could not be laid out", req.rid)
        refusal = f"The prompt could not be laid out ({type(error).__name__}: {error})."
    if refusal:
        insides.refuse(req, refusal)


def _note_way(scheduler: Any, req: Any, notes: requests.Notes) -> str:
    """Why the prompt is refused; empty when it is not."""
    runner, prompt = scheduler.tp_worker.model_runner, insides.prompt_of(req)
    backend, options = backend_of(runner), insides.options_of(scheduler.server_args)
    shortest = config.parse(options.config_text).shortest_sparse(runner.device, options.sp_size)
    wish, plan = requests.wish_of(prompt, shortest), None
    if wish is not None:
        with suppress(LayoutError):  # shorter than a question and a page of context
            plan = backend.plan(prompt.num_tokens, wish)
    own = None if plan is None else backend.own_slots(plan)
    if backend.keeps_parts and (lack := _find_lack_of_slots(scheduler, prompt.num_tokens, own)):
        return lack
    if plan is None:
        return ""
    if lack := _find_lack_of_memory(runner, prompt.num_tokens, backend.activation_bytes(plan)):
        return lack
    notes.wish, notes.own_slots, notes.owned_pages = wish, own, backend.owned_pages(plan)
    notes.rounds = backend.rounds(plan)
    can_be_found = context_cache.keeps_contexts(scheduler) and (own is None or unit_cache.has_units(own))
    _take_a_namespace(req, notes, backend.context_name if can_be_found else None, plan.context_end)
    return ""


def _take_a_namespace(req: Any, notes: requests.Notes, name: str | None, context_end: int) -> None:
    """In the radix cache: that of contexts, or one of the request's own, in which nothing is."""
    if name is not None:
        notes.context_end = context_end
        insides.take_namespace(req, name)
    else:
        insides.take_namespace(req, req.rid)
        insides.leave_nothing_cached(req)


def _find_lack_of_memory(runner: Any, num_tokens: int, num_bytes: int) -> str:
    """A sentence when a GPU has no space for the prompt's rows; `question_tokens` makes a prompt larger than others of
    its length, which were compared when the server started.
    """
    space = prompt_memory.activation_space(runner)
    if space is None or num_bytes <= space:
        return ""
    return (
        f"The prompt of {num_tokens} tokens takes {num_bytes / 1e9:.1f} GB of a GPU that has {space / 1e9:.1f} GB for "
        f"it: give a shorter prompt, or fewer question_tokens."
    )


def _find_lack_of_slots(scheduler: Any, num_tokens: int, own: OwnSlots | None) -> str:
    """A sentence when the prompt can never have its KV slots: SGLang's own check knows one number for all prompts."""
    num_slots = scheduler.max_total_num_tokens
    if capacity.Space(num_slots, scheduler.page_size).fits(num_tokens if own is None else own.num_slots):
        return ""
    return (
        f"The prompt of {num_tokens} tokens does not fit in the {num_slots} KV slots of a rank: exact attention keeps "
        f"every token on every rank; give a shorter prompt, or let it run sparse."
        if own is None
        else f"The prompt of {num_tokens} tokens needs {own.num_slots} of the {num_slots} KV slots of a rank: "
        f"give a shorter prompt."
    )


PATCHES = (
    Patch(
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        "before",
        ("self", "req", "is_retracted"),
        _decide,
    ),
)
