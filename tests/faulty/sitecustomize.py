"""Python runs this in each of a server's processes that has this folder in PYTHONPATH: prompts of certain lengths fail
in our code. The lengths: tests/test_server_walls.py.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

DECIDING, PREPARING, PREPARING_ON_RANK_1, COMPUTING = 1111, 1122, 1133, 1144


def _failing(function: Callable[..., Any], is_struck: Callable[..., bool]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if is_struck(*args):
            raise RuntimeError("a fault of this test")
        return function(*args, **kwargs)

    return run


def _strike(module: ModuleType) -> None:
    if module.__name__ == "sglang_apb.requests":
        module.wish_of = _failing(module.wish_of, lambda prompt, _: prompt.num_tokens == DECIDING)  # type: ignore[attr-defined]
        return
    attention = module.SparseAttention  # type: ignore[attr-defined]
    attention.__init__ = _failing(
        attention.__init__,
        lambda self, layout, group, *_: (
            layout.num_tokens == PREPARING or (layout.num_tokens, group.rank) == (PREPARING_ON_RANK_1, 1)
        ),
    )
    attention.attend = _failing(attention.attend, lambda self, *_: self.layout.num_tokens == COMPUTING)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in ("sglang_apb.requests", "sglang_apb.backends.sparse_attention"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader = spec.loader  # type: ignore[union-attr]
        execute = loader.exec_module  # type: ignore[union-attr]

        def execute_and_strike(module: ModuleType) -> None:
            execute(module)
            _strike(module)

        loader.exec_module = execute_and_strike  # type: ignore[method-assign, union-attr]
        return spec


sys.meta_path.insert(0, _Finder())
