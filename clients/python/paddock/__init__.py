"""Client of Paddock, the server that loads, serves and unloads language models.

Names are imported on first use: a worker process that imports `paddock.v1` must not pay for grpc.
"""

from __future__ import annotations
