"""Official point: `register_radix_cache_backend` (context_cache.py). No target is patched.

Reason: where each rank keeps its own blocks, the page of a token is on one rank alone (`sglang_apb/own_slots.py`). What
is found again are whole units: R blocks, one of each rank, in the slots of one block. In the tree a unit has as many
entries as slots, the digest of its tokens in the first four and zeros behind, so that sizes, locks, eviction and frees
count slots, as SGLang has them. All ranks do the same with the same numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

import torch
from sglang_apb.patches import batches, insides

from sglang_apb.layout import Span
from sglang_apb.own_slots import OwnSlots

# 256 bits, in whole numbers that are not negative.
_ENTRIES_OF_DIGEST = 4


def has_units(own: OwnSlots) -> bool:
    """Whether a unit's digest fits into its slots."""
    return own.block >= _ENTRIES_OF_DIGEST


def digests(tokens: array[int], own: OwnSlots) -> array[int]:
    """The tree's key of the context's whole units."""
    entries = array("q")
    for start in range(0, own.question.start // own.unit * own.unit, own.unit):
        text = memoryview(tokens)[start : start + own.unit].cast("B")
        digest = hashlib.blake2b(text, digest_size=8 * _ENTRIES_OF_DIGEST).digest()
        entries.extend(number >> 1 for number in memoryview(digest).cast("Q"))
        entries.extend([0] * (own.block - _ENTRIES_OF_DIGEST))
    return entries


def unit_cache(base: Any) -> Any:
    """A class of radix caches behind `base`, which keeps contexts token by token."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    class UnitCache(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._own: dict[int, OwnSlots] = {}  # of rows of SGLang's table

        def hold(self, row: int, own: OwnSlots) -> None:
            """The row is a prompt's of which this rank keeps its part."""
            self._own[row] = own

        def match_prefix(self, params: Any) -> Any:
            own = None if params.req is None else insides.notes_of(params.req).own_slots
            if own is None:
                return super().match_prefix(params)
            limit = len(params.key.token_ids) if params.key.limit is None else params.key.limit
            key = self._key(params.req, own, limit)
            found = self._match_tree(MatchPrefixParams(key=key, req=params.req))
            if found.device_prefix_len % own.block:  # the node of the last whole unit is wanted
                key.limit = found.device_prefix_len // own.block * own.block
                found = self._match_tree(MatchPrefixParams(key=key, req=params.req))
            return found._replace(device_prefix_len=found.device_prefix_len // own.block * own.unit)

        def _key(self, req: Any, own: OwnSlots, num_tokens: int) -> Any:
            """Of the whole units of context among the prompt's first tokens."""
            notes = insides.notes_of(req)
            if notes.digests is None:
                notes.digests = array("q") if notes.context_end is None else digests(insides.prompt_ids(req), own)
            num_units = min(num_tokens, own.question.start) // own.unit
            return RadixKey(notes.digests[: num_units * own.block], req.extra_key, cache_salt=req.cache_salt)

        def cached_slots(self, req: Any) -> torch.Tensor:
            """Of the units that were found for the request, int64."""
            return self.path_device_indices(req.last_node)  # type: ignore[no-any-return]

        def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
            own, context_end = insides.notes_of(req).own_slots, insides.notes_of(req).context_end
            if own is None:
                super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
                return
            # Asked again and again while a prompt is between its rounds.
            num_new = 0 if context_end is None else min(up_to, context_end) - req.kv.cache_protected_len
            if self.disable or num_new < own.unit:
                return
            key, num_known = self._key(req, own, up_to), own.num_before(req.kv.cache_protected_len)
            if not req.finished() and self.tree_core.match_full_device_prefix(key)[0] > num_known:
                return  # the tree would free pages that decode may be reading (context_cache.py)
            self._insert(req, own, key, num_known)

        def _insert(self, req: Any, own: OwnSlots, key: Any, num_known: int) -> None:
            """num_known: slots that are the tree's. Those behind become its, or are freed where it has others'."""
            end = len(key) // own.block * own.unit
            row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
            slots = row[own.holders_of(Span(0, end)).to(row.device)].to(torch.int64)
            found = self.insert(
                InsertParams(
                    key=key,
                    value=slots,
                    prev_prefix_len=num_known,
                    inserted_len=num_known,
                    priority=req.priority or 0,
                )
            )
            kept = self.path_device_indices(found.last_device_node).to(torch.int32)
            new = Span(req.kv.cache_protected_len, end)
            places = own.slots_of(new).to(kept.device)
            self.req_to_token_pool.write((req.kv.req_pool_idx, slice(new.start, new.end)), kept[places])
            self.unlock(req.lock)
            req.lock = self.lock(found.last_device_node)
            req.last_node, req.kv.cache_protected_len = found.last_device_node, end

        def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
            own = self._own.get(kv.req_pool_idx)
            if own is None:
                super().free_kv_row(kv, ranges)
                return
            row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
            for start, end in ranges:
                context = Span(start, end).within(Span(0, own.question.start))
                batches.free_slots(self, row[own.holders_of(context).to(row.device)].to(torch.int64))
                batches.free_slots(self, row[max(start, own.question.start) : end].to(torch.int64))

        def on_release(self, req: Any, *, checkpointed: bool) -> None:
            self._own.pop(req.kv.req_pool_idx, None)
            super().on_release(req, checkpointed=checkpointed)

    return UnitCache
