"""`python -m paddock_server`: the server alone, configured by its environment. `paddock serve` has flags."""

from __future__ import annotations

import sys

from paddock_server.app import StartError, run
from paddock_server.config import ConfigError, ServerConfig

if __name__ == "__main__":
    try:
        run(ServerConfig.load({}))
    except (ConfigError, StartError) as error:
        sys.exit(str(error))
