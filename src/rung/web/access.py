"""Who may ask: a key, or, without one, programs of this machine or pages under known names.

A page in somebody's browser can send requests to a server on the same machine. So without a key the `Host` must be a
known name, by default one of this machine, which a domain that was bound to 127.0.0.1 (DNS rebinding) is not, and an
`Origin` must be known too. Sizes are bounded before anything is parsed.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 4 * 2**20
"""A prompt of a million tokens as ids."""
TOO_LARGE = f"a request has at most {MAX_BODY_BYTES // 2**20} MiB"


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class AccessError(Exception):
    """A request that may not be answered."""

    def __init__(self, message: str, status: int, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


class AccessControl:
    """ASGI middleware: refuses requests that may not ask, and bodies that are too large.

    `refuse` makes the response to an error; `is_known_host` says under which host names requests without a key are
    answered. A body that turns out too large while it is read raises `AccessError` in
    the application.
    """

    def __init__(
        self,
        app: ASGIApp,
        refuse: Callable[[AccessError], Response],
        key: str | None = None,
        is_known_host: Callable[[str], bool] = is_loopback,
    ) -> None:
        self.app, self.refuse, self.key, self.is_known_host = app, refuse, key, is_known_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer that it may not ask."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if (error := self._refusal(scope["path"], headers)) is not None:
            await self.refuse(error)(scope, receive, send)
            return
        await self.app(scope, _bounded(receive), send)

    def _refusal(self, path: str, headers: Headers) -> AccessError | None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            return AccessError(TOO_LARGE, 413)
        if self.key is None:
            if not self.is_known_host(_host(headers.get("host", ""))):
                return AccessError("this server does not answer under this host name", 403)
            origin = headers.get("origin")
            if origin is not None and not self.is_known_host(_host(origin.partition("//")[2])):
                return AccessError("this server answers no pages of other hosts", 403)
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # headers come as latin-1, whatever bytes they are
        is_right = hmac.compare_digest(given.encode("latin-1"), self.key.encode()) and scheme.lower() == "bearer"
        if path != "/health" and not is_right:
            return AccessError("this key is wrong, or there is none", 401, "invalid_api_key")
        return None


def _host(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _bounded(receive: Receive) -> Receive:
    """Cut off a body that is longer than its header said, or that has no length."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise AccessError(TOO_LARGE, 413)
        return message

    return bounded
