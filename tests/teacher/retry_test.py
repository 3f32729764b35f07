"""What statuses, headers and bodies mean, and how long is waited."""

import datetime
import email.utils
import json
import random

import pytest

from omniopd_jax.teacher.retry import RetryPolicy, failure_of_status, retry_after_s


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_retryable(status):
    assert failure_of_status(status, {}, "{}").action == "retry"


@pytest.mark.parametrize("status", [400, 404, 405, 413, 422])
def test_not_retryable(status):
    assert failure_of_status(status, {}, "{}").action == "reject"


@pytest.mark.parametrize("status", [401, 402, 403])
def test_hopeless(status):
    assert failure_of_status(status, {}, "{}").action == "stop"


def test_googles_minute_is_waited_for_and_its_day_is_not():
    def body(quota):
        return json.dumps({"error": {"message": "You exceeded your current quota", "details": [
            {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota}]},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"},
        ]}})  # fmt: skip

    minute = failure_of_status(429, {}, body("GenerateContentInputTokensPerModelPerMinute"))
    assert (minute.action, minute.retry_after_s) == ("retry", 34.5)
    assert failure_of_status(429, {}, body("GenerateRequestsPerDayPerProjectPerModel")).action == "stop"


def test_headers_are_understood():
    now = datetime.datetime.now(datetime.UTC)
    later = now + datetime.timedelta(seconds=30)
    assert retry_after_s({"retry-after": "12"}, None) == 12
    assert retry_after_s({"retry-after": email.utils.format_datetime(later)}, None) == pytest.approx(30, abs=2)
    assert retry_after_s({"retry-after-ms": "250"}, None) == 0.25
    limits = {
        "anthropic-ratelimit-input-tokens-remaining": "0",
        "anthropic-ratelimit-input-tokens-reset": later.isoformat().replace("+00:00", "Z"),
        "anthropic-ratelimit-requests-remaining": "7",
        "anthropic-ratelimit-requests-reset": (now + datetime.timedelta(hours=1)).isoformat(),
    }
    assert retry_after_s(limits, None) == pytest.approx(30, abs=2)
    assert retry_after_s({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m2.5s"}, None) == 62.5
    assert retry_after_s({}, {"error": {"message": "busy"}}) is None
    assert retry_after_s({"retry-after": "soon"}, ["?"]) is None


def test_waits_grow_stay_below_the_cap_and_respect_the_provider():
    policy = RetryPolicy(base_s=1.0, cap_s=8.0)
    rng = random.Random(0)
    for attempt, longest in enumerate([1, 2, 4, 8, 8, 8], start=1):
        waits = [policy.wait_s(attempt, None, rng) for _ in range(200)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
        assert len(set(waits)) > 100  # jitter: no thundering herd
    assert min(policy.wait_s(1, 100.0, rng) for _ in range(100)) >= 100.0


@pytest.mark.parametrize(
    "body", ["", "null", "[]", "[{}]", '{"error": "text"}', '{"error": null}', "<html>", '{"detail": "x"}']
)
def test_any_body_is_survived(body):
    for status in (400, 429, 500):
        assert str(status) in str(failure_of_status(status, {}, body))
