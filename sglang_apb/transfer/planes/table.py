"""The data planes that there are. A line here and a file beside this one make another."""

from __future__ import annotations

from dataclasses import dataclass

AUTO, ZMQ = "auto", "zmq"


@dataclass(frozen=True)
class Plane:
    """`module` of this package has its two halves (`base.py`). With `by_itself`, "auto" tries it, in the table's order;
    `argument` is what `data_plane` says after its name and a colon, if anything.
    """

    module: str
    by_itself: bool = True
    argument: str = ""


PLANES = {
    "cuda_ipc": Plane("cuda_ipc"),
    "nccl": Plane("nccl"),
    "file": Plane("file", by_itself=False, argument="FOLDER"),
}
