"""Servers that answer over OpenAI's API what a function says, with the report where the plugin puts it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAX_MODEL_LEN = 8192
REPORT = {
    "method": "apb",
    "num_ranks": 2,
    "num_blocks": 16,
    "attention_share": 0.31,
    "kv_bytes": 1234567,
    "kv_bytes_hidden": 1200000,
}
# Of a request's body: the answer's words, or None to break off.
Say = Callable[[dict[str, Any]], str | None]


@contextmanager
def servers_that_say() -> Iterator[Callable[[Say], str]]:
    """Starts servers that stream completions; gives their URLs."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Say) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"model_path": "m", "data": [{"max_model_len": MAX_MODEL_LEN}]}).encode())

            def do_POST(self) -> None:
                said = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                if said is not None:
                    self.wfile.write(_events(said))

            def log_message(self, *_: Any) -> None:
                """Silent."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _events(text: str) -> bytes:
    """As SGLang writes them: of a chat a delta, of a completion a text."""
    base = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "default"}
    words = re.findall(r" \S+", text)
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": word}, "text": word}]} for word in words]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "metadata": {"prefill": REPORT}})
    usage = {"prompt_tokens": 7000, "completion_tokens": 2, "total_tokens": 7002}
    chunks.append({"choices": [], "usage": usage})
    return b"".join(b"data: " + json.dumps(base | chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
