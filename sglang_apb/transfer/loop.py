"""The thread that owns a process's ZMQ sockets: they are not thread-safe, so nobody else touches them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence

import zmq
from zmq.auth.thread import ThreadAuthenticator

from sglang_apb.transfer.protocol.keys import Keys
from sglang_apb.transfer.protocol.wire import MAX_PARTS, Buffer

logger = logging.getLogger(__name__)

Handler = Callable[[], None]

# ZMQ's own thread asks and answers, so a busy scheduler is not taken for a dead one. Who connects (decode) closes a
# connection over which no answer came for PING_MS + SILENCE_MS, who listens (prefill) one without a ping for WATCH_MS:
# so much later that decode has closed it, too, whenever prefill itself was stopped for so long that its watch has run
# out. It would else drop requests that came since. With PROBE_MS (prefill/endpoint.py): under 5 s.
PING_MS = 750
SILENCE_MS = 2250
WATCH_MS = PING_MS + SILENCE_MS + PING_MS + 250
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
# ZMQ's limit counts what CURVE adds to a part: 33 bytes.
_ENCRYPTION_BYTES = 64


class SocketLoop:
    """Runs socket handlers and commands of other threads in one thread, until `stop`.

    A handler or command that raises is logged and the loop goes on: one bad peer never ends the others'.
    """

    def __init__(self, name: str, keys: Keys | None = None):
        self.context = zmq.Context()
        self.keys = keys
        self._authenticator = _authenticate(self.context, keys) if keys else None
        self._poller = zmq.Poller()
        self._handlers: dict[int, Handler] = {}
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._poller.register(self._wake, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and closes every socket. For tests; a server's loop ends with its process."""
        self.call(self._end)
        self._thread.join()
        if self._authenticator is not None:
            self._authenticator.stop()
        self.context.destroy(linger=0)
        wake, self._wake = self._wake, -1
        os.close(wake)

    def call(self, command: Callable[[], None]) -> None:
        """Runs `command` in the loop's thread, in the order of the calls. Never blocks, and takes no lock that the
        garbage collector could wait for (SimpleQueue: "put() is reentrant").
        """
        self._commands.put(command)
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def watch(self, socket: zmq.Socket, handler: Handler) -> None:
        self._poller.register(socket, zmq.POLLIN)
        self._handlers[id(socket)] = handler

    def forget(self, socket: zmq.Socket) -> None:
        """Closes a watched socket."""
        self._poller.unregister(socket)
        self._handlers.pop(id(socket), None)
        socket.close(linger=0)

    def work(self) -> int | None:
        """Does one piece of the endpoint's own work. Returns how many milliseconds to wait for
        sockets before the next piece; None when there is none until a socket or a command brings one.
        """
        return None

    def _end(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        timeout: int | None = None
        while not self._stopping:
            for source, _ in self._poller.poll(timeout):
                if source == self._wake:
                    self._run_commands()
                else:
                    self._guard(self._handlers.get(id(source)))
            timeout = self._guard(self.work)

    def _run_commands(self) -> None:
        os.eventfd_read(self._wake)
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            self._guard(command)

    def _guard(self, function: Callable[[], int | None] | None) -> int | None:
        try:
            return function() if function else None
        except Exception:
            logger.exception("KV transfer: a frame or command failed; the transfer thread goes on")
            return None


def _authenticate(context: zmq.Context, keys: Keys) -> ThreadAuthenticator:
    authenticator = ThreadAuthenticator(context, log=logging.getLogger(f"{__name__}.zap"))
    authenticator.start()
    authenticator.configure_curve_callback("*", keys)
    return authenticator


def guard(socket: zmq.Socket, max_bytes: int) -> None:
    """Before `bind` or `connect`: lets ZMQ close connections to peers that never speak, or send parts of more than
    `max_bytes`."""
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + _ENCRYPTION_BYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, PING_MS + SILENCE_MS)
    # A host that is gone never closes its connections: what nobody sends over any more is closed after 90 s.
    for option, value in (
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 60),
        (zmq.TCP_KEEPALIVE_INTVL, 10),
        (zmq.TCP_KEEPALIVE_CNT, 3),
    ):
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, PING_MS + SILENCE_MS)


def ask_for_heartbeats(socket: zmq.Socket) -> None:
    """Before `connect`: lets ZMQ close the connection, on both sides, when the other one is silent.

    For a connection of its own. On one where so much may arrive that ZMQ stops reading it, pings end the process if the
    peer goes just then (libzmq 4.3.5, stream_engine_base.cpp, out_event: "Assertion failed: !_io_error"). Who connects
    sends nothing else over it: the other side's watch (HEARTBEAT_TTL) begins with a ping of ZMQ's, and ends with any
    message (decode_and_push), so a process that is stopped after a message of its own would never be missed.
    """
    socket.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, WATCH_MS)


def keep_freed_memory() -> None:
    """For a process that receives much: ZMQ allocates each part that arrives. Memory that glibc has given back to the
    system in between comes with page faults (`benchmarks/results/page-faults-cpu.txt`).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, num_bytes in ((_M_MMAP_THRESHOLD, 4 << 20), (_M_TRIM_THRESHOLD, 64 << 20)):
            mallopt(parameter, num_bytes)


def receive(socket: zmq.Socket, max_parts: int = MAX_PARTS) -> list[zmq.Frame] | None:
    """The parts of the next message, without waiting: None when there is none.

    Of a message with more than `max_parts` parts, one part more is kept, so that the parser refuses it.
    """
    try:
        parts = [socket.recv(zmq.NOBLOCK, copy=False)]
    except zmq.Again:
        return None
    while socket.getsockopt(zmq.RCVMORE):
        part = socket.recv(copy=False)
        if len(parts) <= max_parts:
            parts.append(part)
    return parts


def buffers(parts: Sequence[zmq.Frame]) -> list[Buffer]:
    return [part.buffer for part in parts]


def sender_key(part: zmq.Frame) -> str:
    """The public key that the authenticator let in; "" on a connection without keys."""
    try:
        return str(part.get("User-Id"))
    except zmq.ZMQError:
        return ""
