"""Saying no to a request."""

from __future__ import annotations

from typing import NoReturn

from paddock.errors import InvalidFieldError


class RequestRefusedError(Exception):
    """HTTP itself is wrong: the path, the method, the size, the JSON. No RPC knows such an error."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers


def refuse(parameter: str, description: str) -> NoReturn:
    """Raise the error for one parameter; `description` says what is wrong and what would be right."""
    raise InvalidFieldError.of(parameter, description) from None


def refuse_http(
    status: int, code: str, message: str, *, headers: tuple[tuple[str, str], ...] = ()
) -> NoReturn:
    """Raise the error for a request that HTTP itself is wrong with."""
    raise RequestRefusedError(status, code, message, headers=headers) from None
