"""The one retry policy: what a failed call means, and how long to wait before the next attempt."""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import json
import random
import re
from collections.abc import Mapping
from typing import Any, Literal

_RETRYABLE = frozenset({408, 409, 425, 429, 529})  # and every 5xx
_STOPPING = frozenset({401, 402, 403})  # no later call can succeed
# Codes and sentences by which providers say that money or the day's quota is spent. Waiting does not help.
_SPENT_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error"})
_SPENT_TEXT = re.compile(r"credit balance|specified API usage limits|spend(ing)? limit|Insufficient Balance", re.I)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class CallFailed(Exception):
    """One attempt brought no answer.

    Attributes:
      action: "retry": a later attempt may succeed; "reject": this request never will, others may; "stop": none will.
      reason: one word for counters: the HTTP status, "timeout", "connection", "garbled", "too_large".
      retry_after_s: what the provider asked us to wait, or None.
      is_charged: the provider may have billed the call although no answer arrived.
    """

    def __init__(
        self,
        action: Literal["retry", "reject", "stop"],
        reason: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        is_charged: bool = False,
    ):
        super().__init__(message)
        self.action = action
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.is_charged = is_charged


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter; never earlier than the provider asks."""

    max_attempts: int = 8  # the first included
    base_s: float = 0.5  # before the second attempt
    cap_s: float = 60.0  # longest wait that we choose ourselves

    def wait_s(self, attempt: int, retry_after_s: float | None, rng: random.Random) -> float:
        """Seconds to wait after failed attempt number `attempt` (1 = the first)."""
        backoff_s = min(self.cap_s, self.base_s * 2.0 ** (attempt - 1)) * rng.uniform(0.5, 1.0)
        if retry_after_s is None:
            return backoff_s
        return max(backoff_s, retry_after_s + rng.uniform(0.0, self.base_s))


def failure_of_status(status: int, headers: Mapping[str, str], body: str) -> CallFailed:
    """What an HTTP error status means.

    Args:
      status: HTTP status, not 2xx.
      headers: case-insensitive mapping of the reply's headers.
      body: the reply's text, whatever it is.
    """
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    message = f"HTTP {status}: {_message(parsed) or body[:300]}"
    if status in _STOPPING or _is_spent(parsed, message):
        return CallFailed("stop", str(status), message)
    if status in _RETRYABLE or status >= 500:
        return CallFailed("retry", str(status), message, retry_after_s=retry_after_s(headers, parsed))
    return CallFailed("reject", str(status), message)


def retry_after_s(headers: Mapping[str, str], body: Any) -> float | None:
    """Seconds that the provider asks us to wait: the longest of what its headers and its body say, or None.

    Understands `retry-after` (seconds or a date), `retry-after-ms`, `anthropic-ratelimit-*-reset` (where nothing
    remains), `x-ratelimit-reset-*` (likewise; OpenAI's "6m0s") and the `RetryInfo.retryDelay` of Google's errors.
    """
    waits = [
        _seconds_or_date(headers.get("retry-after")),
        _scaled(headers.get("retry-after-ms"), 0.001),
        *(
            _seconds_or_date(headers.get(f"anthropic-ratelimit-{kind}-reset"))
            for kind in ("requests", "tokens", "input-tokens", "output-tokens")
            if headers.get(f"anthropic-ratelimit-{kind}-remaining") == "0"
        ),
        *(
            _duration(headers.get(f"x-ratelimit-reset-{kind}"))
            for kind in ("requests", "tokens")
            if headers.get(f"x-ratelimit-remaining-{kind}") == "0"
        ),
        *(_duration(detail.get("retryDelay")) for detail in _details(body)),
    ]
    known = [max(wait, 0.0) for wait in waits if wait is not None]
    return max(known) if known else None


def _error(body: Any) -> dict[str, Any]:
    if isinstance(body, list) and body:
        body = body[0]  # Google wraps its errors in a list at times
    if not isinstance(body, dict):
        return {}
    error = body.get("error", body)
    return error if isinstance(error, dict) else {"message": str(error)}


def _message(body: Any) -> str:
    error = _error(body)
    return str(error.get("message") or error.get("detail") or "")[:500]


def _details(body: Any) -> list[dict[str, Any]]:
    details = _error(body).get("details")
    return [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []


def _is_spent(body: Any, message: str) -> bool:
    error = _error(body)
    if {str(error.get("code")), str(error.get("type"))} & _SPENT_CODES or _SPENT_TEXT.search(message):
        return True
    # Google's quota errors share one sentence; only the violated quota's name tells a day from a minute.
    return any("PerDay" in json.dumps(detail.get("violations", "")) for detail in _details(body))


def _scaled(text: str | None, scale: float) -> float | None:
    try:
        return float(text) * scale if text is not None else None
    except ValueError:
        return None


def _duration(text: Any) -> float | None:
    if not isinstance(text, str):
        return None
    parts = _DURATION.findall(text)
    return sum(float(number) * _SECONDS[unit] for number, unit in parts) if parts else _scaled(text, 1.0)


def _seconds_or_date(text: str | None) -> float | None:
    if text is None:
        return None
    seconds = _scaled(text, 1.0)
    if seconds is not None:
        return seconds
    for parse in (email.utils.parsedate_to_datetime, datetime.datetime.fromisoformat):
        try:
            date = parse(text)
        except ValueError:
            continue
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        return (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return None
