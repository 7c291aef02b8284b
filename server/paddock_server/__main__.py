"""`python -m paddock_server`: the server alone, configured by its environment. `paddock serve` has flags."""

from __future__ import annotations

import sys

from paddock_server.app import run
from paddock_server.config import ConfigError, ServerConfig

if __name__ == "__main__":
    try:
        config = ServerConfig.load({})
    except ConfigError as error:
        sys.exit(str(error))
    sys.exit(run(config))
