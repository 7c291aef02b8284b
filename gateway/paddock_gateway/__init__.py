"""The gateway: OpenAI's HTTP API in front of the `ModelManager` service.

`paddock_gateway.app.create_app` makes the ASGI application, `paddock_gateway.serve.serve` runs it in the
event loop that is there already. Everything it needs of a server is `paddock.api.ModelManagerApi`.
"""

from __future__ import annotations
