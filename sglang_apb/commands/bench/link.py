"""What communication between ranks takes, from a link's figures: for ranks that are not there. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# All-gathers of 1 to 512 MB a rank over two H200 joined by NVLink took 27 us and 4 ns a KB, within 10%.
DEFAULT_GB_PER_S = 250.0
DEFAULT_LATENCY_US = 27.0
# Between hosts, in Gbit/s: what the network alone takes.
NETWORKS_GBIT_PER_S = (1, 10, 100, 400)


@dataclass(frozen=True)
class Link:
    """`gb_per_s`: 1e9 bytes a second into one rank. `latency_us` of a collective, whatever its size."""

    gb_per_s: float = DEFAULT_GB_PER_S
    latency_us: float = DEFAULT_LATENCY_US

    @classmethod
    def fitted(cls, small: tuple[float, float], large: tuple[float, float]) -> Link:
        """The line through two measured collectives, (bytes, seconds) each.

        Without latency, through the large one alone, where that line would have less than none or not rise.
        """
        if large[1] / large[0] >= small[1] / small[0] or large[1] <= small[1]:
            return cls(large[0] / large[1] / 1e9, 0.0)
        bytes_per_s = (large[0] - small[0]) / (large[1] - small[1])
        return cls(bytes_per_s / 1e9, (small[1] - small[0] / bytes_per_s) * 1e6)

    def seconds(self, num_bytes: float) -> float:
        """Until a rank has received `num_bytes` of one collective."""
        return self.latency_us * 1e-6 + num_bytes / (self.gb_per_s * 1e9)


def all_reduce_bytes(num_bytes: int, num_ranks: int) -> float:
    """What a rank receives while `num_bytes` are summed over the ranks in a ring: once to sum, once to spread."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes


def apb_exposed(received: Sequence[int], own: float, before: float, link: Link) -> float:
    """Seconds that a layer waits for other ranks.

    received: bytes of each collective in the order of their start: anchor and passing, and last the question's.
    own, before: seconds of attention over own blocks, during which what is handed on travels, and over what was
    handed on, during which the question's partial results do.
    """
    if not received:
        return 0.0
    *handed_on, question = received
    return max(sum(map(link.seconds, handed_on)) - own, 0.0) + max(link.seconds(question) - before, 0.0)


def exact_exposed(num_rows: int, hidden: int, item_bytes: int, num_ranks: int, link: Link) -> float:
    """Seconds of a tensor-parallel layer's two all-reduces of its hidden states, which nothing hides."""
    return 2 * link.seconds(all_reduce_bytes(num_rows * hidden * item_bytes, num_ranks))
