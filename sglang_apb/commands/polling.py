"""Whether servers answer, and what they say when they do not do what was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import requests

from sglang_apb.commands import CommandError

_SAID_WIDTH = 500
# Answers that no waiting changes.
_FINAL = (requests.codes.bad_request, requests.codes.unauthorized, requests.codes.forbidden)


class ServiceError(CommandError):
    """A server ended, did not start in time, or refused a simple request."""


@dataclass(frozen=True)
class Reply:
    """`said`: the status and the text of an answer, or why there is none."""

    is_ok: bool
    said: str


def is_up(url: str) -> bool:
    """Whether a server answers its health check."""
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False


def ask_chat(url: str, api_key: str | None = None) -> Reply:
    """What a chat completion of one token is answered. Raises ServiceError when it is refused for good."""
    body: dict[str, Any] = {
        "model": "default",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1,
    }
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = requests.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    except requests.RequestException as error:
        return Reply(False, f"no answer ({type(error).__name__})")
    said = f"HTTP {response.status_code} {response.text[:_SAID_WIDTH]}".strip()
    if response.status_code in _FINAL:
        raise ServiceError(f"{url} refuses a chat completion: {said}")
    return Reply(response.ok, said)
