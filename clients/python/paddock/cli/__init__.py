"""The command line, `paddock`."""

from __future__ import annotations

import os
import sys

from paddock.interrupts import INTERRUPTED, leave_quietly


def main() -> None:
    """Run the command line and exit."""
    leave_quietly()
    # What gRPC's core has to say about connections is said by our own errors, in a sentence.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from paddock.cli.app import app

    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
