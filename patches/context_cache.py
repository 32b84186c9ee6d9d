"""Official point: `register_radix_cache_backend`, a subclass of SGLang's radix cache. No target is patched.

Reason: of a sparse prompt the context is found again, and its question never is: its K and V are those of exact
attention over the context. The context stands under an `extra_key` of its own (`insides.take_namespace`), so that
neither exact prompts nor those of other lengths find it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang_apb.patches import insides
from sglang_apb.patches.unit_cache import unit_cache

from sglang_apb.options import CONTEXT_CACHE


def register() -> None:
    """Once a process."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends

    if CONTEXT_CACHE not in registered_radix_cache_backends():
        register_radix_cache_backend(CONTEXT_CACHE, _create)


def keeps_contexts(scheduler: Any) -> bool:
    """Whether the scheduler's cache is ours."""
    return getattr(scheduler.tree_cache, "keeps_contexts", False) is True


def _create(context: Any) -> Any:
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    keeps_parts = insides.keeps_parts(context.server_args)
    return create_unified_radix_cache(context, cache_class=cache_class(keeps_parts))


def cache_class(keeps_parts: bool) -> Any:
    """`keeps_parts`: each of several ranks keeps its own blocks of a sparse prompt only."""
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    class ContextCache(UnifiedRadixCache):
        keeps_contexts = True

        def match_prefix(self, params: Any) -> Any:
            end = None if params.req is None else insides.notes_of(params.req).context_end
            if end is not None:
                key = params.key
                limit = end if key.limit is None else min(end, key.limit)
                capped = RadixKey(key.token_ids, key.extra_key, key.is_bigram, limit, key.cache_salt)
                params = dataclasses.replace(params, key=capped)
            return super().match_prefix(params)

        def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
            end = insides.notes_of(req).context_end
            up_to = up_to if end is None else min(up_to, end)
            if end is None or not (self._has(req, up_to) or self._would_free_what_decode_reads(req, up_to)):
                super().checkpoint_into_tree(req, up_to=up_to, **kwargs)

        def on_release(self, req: Any, *, checkpointed: bool) -> None:
            """Every end of a request comes here; SGLang may go on to hold the request itself."""
            insides.notes_of(req).handed_on.clear()
            super().on_release(req, checkpointed=checkpointed)

        def _has(self, req: Any, up_to: int) -> bool:
            """A prefill server asks again and again while a prompt is between its rounds."""
            return not req.finished() and 0 < up_to // self.page_size * self.page_size <= req.kv.cache_protected_len

        def _would_free_what_decode_reads(self, req: Any, up_to: int) -> bool:
            """Where another prompt has left the same context meanwhile, the tree frees this one's copy at once. Its
            layers have left before that, and decode may still read them: it stays until the transfer has ended.
            """
            if req.finished() or insides.pair_half() != "prefill":
                return False
            key = RadixKey(req.full_untruncated_fill_ids[:up_to], req.extra_key, cache_salt=req.cache_salt)
            return bool(self.tree_core.match_full_device_prefix(key)[0] > req.kv.cache_protected_len)

    return unit_cache(ContextCache) if keeps_parts else ContextCache
