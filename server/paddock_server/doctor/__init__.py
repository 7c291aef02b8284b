"""What `paddock doctor` knows: facts about this machine, gathered with time limits, and what they mean."""

from __future__ import annotations

from paddock_server.doctor.examine import examine, examine_server, is_own, own_address
from paddock_server.doctor.findings import Finding, Level

__all__ = ["Finding", "Level", "examine", "examine_server", "is_own", "own_address"]
