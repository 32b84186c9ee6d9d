"""A short soak; `python tests/soak_transfer.py` is the long one."""

from __future__ import annotations

from soak_transfer import Soak


def test_no_request_is_wrong_or_hangs_while_processes_die() -> None:
    report = Soak(num_requests=50, fault_every_s=1.5, pause_s=0.15, seed=7).run()
    assert not report.problems, "\n".join(report.problems)
    assert report.whole > report.requests // 3 and report.faults.total() >= 3
