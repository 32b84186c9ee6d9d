"""Page-aligned KV slots on a CPU: SGLang's paged allocator without its Triton kernels."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """Hands out slots by whole pages. Slot tensors are int64 on the CPU; None means that the pool is full."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for tokens [prefix_len, seq_len) of each request, [extend_num_tokens]."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self._reserve(num_new_pages):
            return None
        slots = torch.empty(extend_num_tokens, dtype=torch.int64)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device)
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """The slot of token seq_len - 1 of each request, [num_requests]."""
        starts_page = (seq_lens - 1) % self.page_size == 0
        num_new_pages = int(starts_page.sum())
        if not self._reserve(num_new_pages):
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[starts_page] = self.free_pages[:num_new_pages] * self.page_size
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def _reserve(self, num_pages: int) -> bool:
        if self.need_sort and num_pages > len(self.free_pages):
            self.merge_and_sort_free()
        return num_pages <= len(self.free_pages)
