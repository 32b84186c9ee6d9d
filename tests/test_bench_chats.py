"""benchmarks/cluster_chats.py: what it reads of an answer, and when it takes one for right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cluster_chats
from cluster_chats import LEFT, NEAR_TIE, RIGHT, WRONG, Reply

USAGE = {"prompt_tokens": 900, "prompt_tokens_details": {"cached_tokens": 128}}
SPARSE = {"prefill": {"method": "apb"}}


def token(text: str, **others: float) -> dict[str, Any]:
    """With its log-probability -1, and those of others at its place."""
    top = {text: -1.0, **others}
    return {"token": text, "logprob": -1.0, "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}


def reply(*tokens: dict[str, Any]) -> Reply:
    return Reply("".join(entry["token"] for entry in tokens), list(tokens), 0, {})


WANTED = reply(token("a"), token("b", c=-1.04, d=-3.0), token("."))


def test_a_stream_gives_what_a_whole_answer_does() -> None:
    logprobs = [{"content": [token("Yes")]}, {"content": [token("!")]}]
    whole = {
        "choices": [{"message": {"content": "Yes!"}, "logprobs": {"content": [token("Yes"), token("!")]}}],
        "usage": USAGE,
        "metadata": SPARSE,
    }
    stream = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}, "logprobs": None}], "usage": None},
        {"choices": [{"delta": {"content": "Yes"}, "logprobs": logprobs[0]}], "usage": None},
        {"choices": [{"delta": {"content": "!"}, "logprobs": logprobs[1]}], "usage": None, "metadata": SPARSE},
        {"choices": [], "usage": USAGE},
    ]
    found = cluster_chats._reply([whole])
    assert found == cluster_chats._reply(stream)
    assert (found.text, found.cached_tokens, found.prefill["method"]) == ("Yes!", 128, "apb")


@pytest.mark.parametrize("parts", [[], [{"choices": [{"delta": {"content": "Yes"}}]}]])
def test_a_stream_that_breaks_off_is_no_answer(parts: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="has no end"):
        cluster_chats._reply(parts)


@pytest.mark.parametrize(
    ("found", "outcome", "said"),
    [
        (WANTED, RIGHT, ""),
        (reply(token("a"), token("c"), token("x")), NEAR_TIE, "token 1 is 'c' (-1.04) instead of 'b' (-1.0)"),
        (reply(token("a"), token("d"), token(".")), WRONG, "token 1 is 'd' (-3.0) instead of 'b' (-1.0)"),
        (reply(token("a"), token("e"), token(".")), WRONG, "token 1 is 'e' (None) instead of 'b' (-1.0)"),
        (reply(token("a"), token("b")), WRONG, "'ab' instead of 'ab.'"),
        (requests.ConnectionError("refused"), WRONG, "ConnectionError: refused"),
        (None, LEFT, ""),
    ],
)
def test_only_near_ties_may_differ(found: Reply | Exception | None, outcome: str, said: str) -> None:
    assert cluster_chats.judge(found, WANTED, near_tie=0.1) == (outcome, said)


def test_the_exit_status_needs_right_answers_and_living_servers(capsys: pytest.CaptureFixture[str]) -> None:
    right, dead = [WANTED, None], [WANTED, requests.ConnectionError("refused")]
    assert cluster_chats.report(right, [WANTED] * 2, 0.1, is_alive=True) == 0
    assert cluster_chats.report(right, [WANTED] * 2, 0.1, is_alive=False) == 1
    assert cluster_chats.report(dead, [WANTED] * 2, 0.1, is_alive=True) == 1
    assert "chat 1, wrong: ConnectionError: refused" in capsys.readouterr().out
