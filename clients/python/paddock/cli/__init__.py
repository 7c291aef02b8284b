"""The command line, `paddock`."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line and exit."""
    # What gRPC's core has to say about connections is said by our own errors, in a sentence.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from paddock.cli.app import app

    app()
