"""Target: `ModelRunner.load_model`. Reason: with sequence-parallel ranks every rank holds the whole model, while
SGLang's layers would each take 1/R of it.

The layers read the tensor-parallel size while they are built, and the group of a sum each time that they run: both are
overridden while the model is loaded and while it runs (`insides.as_one_rank`, by `ParallelContext.override`).
Official point tried: a context-parallel strategy keeps SGLang's layers on 1/R of their weights, and is taken for every
request (docs/architecture.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_apb.patches import insides
from sglang_apb.patches._patch import Patch


def _load_whole_model(original: Any, self: Any) -> Any:
    with insides.as_one_rank():
        result = original(self)
    for module in (self.model, self.model.model):  # prefill graphs call the inner one
        module.forward = _alone(module.forward)
    return result


def _alone(forward: Callable[..., Any]) -> Callable[..., Any]:
    """On the model and not on its runner, so that CUDA graphs are captured so, too."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with insides.as_one_rank():
            return forward(*args, **kwargs)

    return run


PATCHES = (
    Patch("sglang.srt.model_executor.model_runner.ModelRunner.load_model", "around", ("self",), _load_whole_model),
)
