"""`python -m paddock_server`: the server alone, configured by its environment. `paddock serve` has flags."""

from __future__ import annotations

import sys

from paddock.interrupts import leave_quietly


def main() -> None:
    """Run the server until it is told to stop."""
    leave_quietly()
    from paddock_server.app import StartError, run  # long to import
    from paddock_server.config import ConfigError, ServerConfig

    try:
        run(ServerConfig.load({}))
    except (ConfigError, StartError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
