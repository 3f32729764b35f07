"""Connections: one pooled HTTP client for every SDK, with bounded replies and the rules about plain http."""

from __future__ import annotations

import ipaddress
import json
import logging
import urllib.parse
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from omniopd_jax.config import ConfigError
from omniopd_jax.teacher.retry import CallFailed, failure_of_status

_Result = TypeVar("_Result")

MAX_REPLY_BYTES = 8 * 2**20  # a reply of 64 samples of 1000 tokens is below 1 MB


class ReplyTooLarge(Exception):
    """The server sent more than any answer can be; the rest is not read."""


def check_address(url: str, *, allow_insecure_http: bool) -> None:
    """Refuses plain http to anything but this machine, and passwords in an address.

    Raises:
      ConfigError: with the setting that would allow it.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "config.teacher.base_url must be an address like https://host/v1 or http://127.0.0.1:8000/v1."
        )
    if parts.username or parts.password:
        raise ConfigError("config.teacher.base_url must not hold a user or password; keys come from the environment.")
    if parts.scheme == "http" and not is_loopback(url) and not allow_insecure_http:
        raise ConfigError(
            f"config.teacher.base_url sends prompts and keys in the clear to {parts.hostname}; use https, or set "
            "config.teacher.allow_insecure_http=True for a network that you trust."
        )


def is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def http_client(base_url: str, *, timeout_s: float, max_connections: int) -> Any:
    """An `httpx2.AsyncClient` for an SDK: pooled, bounded replies, no redirects (they could carry the key elsewhere).

    Proxies of the environment are respected, except for this machine itself.
    """
    import httpx2

    class BoundedStream(httpx2.AsyncByteStream):
        def __init__(self, inner: Any):
            self._inner = inner

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._inner:
                size += len(chunk)
                if size > MAX_REPLY_BYTES:
                    raise ReplyTooLarge(f"the reply is larger than {MAX_REPLY_BYTES} bytes")
                yield chunk

        async def aclose(self) -> None:
            await self._inner.aclose()

    async def bound(response: Any) -> None:
        # We ask for plain bodies, so a packed one is refused: its unpacked size would be unbounded.
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ReplyTooLarge("the reply is compressed although it was asked for plain")
        response.stream = BoundedStream(response.stream)

    for name in ("httpx2", "google_genai.models"):  # a line a call at level INFO drowns the run's own log
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.WARNING)
    return httpx2.AsyncClient(
        timeout=timeout_s,
        limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        trust_env=not is_loopback(base_url),
        follow_redirects=False,
        headers={"accept-encoding": "identity"},
        event_hooks={"response": [bound]},
    )


async def guarded(call: Awaitable[_Result]) -> _Result:
    """Awaits an SDK's call.

    Raises:
      CallFailed: what its exception means. Raised outside the handler: the SDK's own exception, which may repeat the
        key, is not carried along as context.
    """
    try:
        return await call
    except Exception as error:
        failure = failure_of_error(error)
    raise failure


def failure_of_error(error: Exception) -> CallFailed:
    """What an exception out of an SDK or the HTTP client means."""
    import httpx2

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for member in chain:
        if isinstance(member, CallFailed):
            return member
        if isinstance(member, ReplyTooLarge):
            return CallFailed("retry", "too_large", str(member), is_charged=True)
        response: Any = getattr(member, "response", None)
        if isinstance(response, httpx2.Response):
            return failure_of_status(response.status_code, response.headers, _text(response))
    if any(isinstance(link, httpx2.TimeoutException | TimeoutError) for link in chain):
        return CallFailed("retry", "timeout", "no answer in time", is_charged=True)
    if any(isinstance(link, httpx2.HTTPError | OSError | EOFError) for link in chain):
        never_sent = any(isinstance(link, httpx2.ConnectError | httpx2.ProxyError) for link in chain)
        root = chain[-1]
        return CallFailed("retry", "connection", f"{type(root).__name__}: {root}", is_charged=not never_sent)
    if any(isinstance(link, json.JSONDecodeError) for link in chain):  # an SDK that tried to read an error page
        return CallFailed("retry", "garbled", "the reply is not JSON", is_charged=True)
    raise error  # a bug of ours or of the SDK: not to be retried, not to be hidden


def json_of(content: bytes, content_type: str) -> dict[str, Any]:
    """A reply's JSON object.

    Raises:
      CallFailed: it is not one. A gateway's page, a cut body: another attempt may do better.
    """
    try:
        body = json.loads(content)
    except ValueError as error:
        raise CallFailed(
            "retry", "garbled", f"the reply is not JSON ({content_type or 'no content type'}): {error}", is_charged=True
        ) from None
    if not isinstance(body, dict):
        raise CallFailed(
            "retry", "garbled", f"the reply is a JSON {type(body).__name__}, not an object", is_charged=True
        )
    return body


def _text(response: Any) -> str:
    try:
        return response.text
    except Exception:  # the body was never read, or is in no known encoding: the status says enough
        return ""
