"""Prefill side: sends a prompt's layers one by one while later ones are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sglang_apb.transfer.memory.pages import PageIds
from sglang_apb.transfer.prefill.transfer import IsFinal, always


class LayerStream:
    """To be called with a layer's number once its KV is written, or on a GPU once the kernels that write it run.

    `first_slots` [num_pages] are the pool slots of the first token of each page that is to be sent. They are copied
    without waiting for the GPU, which the scheduler's thread must not do before the first layer.
    """

    def __init__(self, sender: Any, first_slots: torch.Tensor, page_size: int) -> None:
        self._sender = sender
        pages = first_slots.to(torch.int64) // page_size
        if pages.is_cuda:
            self._pages = torch.empty(pages.shape, dtype=pages.dtype, pin_memory=True)
            self._pages.copy_(pages, non_blocking=True)
        else:
            self._pages = pages
        self._is_cuda = pages.is_cuda

    def __call__(self, layer: int) -> None:
        self._sender.stream_layer(layer, self._page_ids, len(self._pages), self._when_final())

    def _page_ids(self) -> PageIds:
        ids: PageIds = self._pages.numpy()
        return ids.astype(np.int64, copy=False)

    def _when_final(self) -> IsFinal:
        if not self._is_cuda:
            return always
        event = torch.cuda.Event()
        event.record()
        is_final: IsFinal = event.query
        return is_final
