"""The gateway against a scripted server: the real OpenAI SDK, real sockets, no model."""

from __future__ import annotations
