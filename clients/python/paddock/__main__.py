"""`python -m paddock`: the command line."""

from __future__ import annotations

from paddock.cli import main

if __name__ == "__main__":
    main()
