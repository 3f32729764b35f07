"""The client's promises, against a server that counts."""

import json
import threading
import time

import pytest

from omniopd_jax.teacher.protocol import BudgetExhausted, TeacherStopped, Usage

KINDS = ("openai", "anthropic", "gemini")


def total(results):
    return sum((result.usage for result in results), Usage())


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_gets_n_different_texts(kind, make, server, ask):
    teacher = make(kind)
    requests = [ask(prefix=f" step {i}", seed=i, n=4, is_raw=kind == "openai") for i in range(12)]
    results = teacher.continue_texts(requests)
    assert [len(result.continuations) for result in results] == [4] * 12
    for result in results:
        assert len({found.text for found in result.continuations}) == 4
        assert {found.finish_reason for found in result.continuations} == {"length"}
        assert result.num_missing == result.num_refused == result.num_cached == 0
        assert result.latency_s > 0


@pytest.mark.parametrize("kind", KINDS)
def test_usage_adds_up_with_the_servers_own_log(kind, make, server, ask, faults, spent, failures):
    teacher = make(kind)
    server.behave = lambda call: faults.Answer(status=500 if call.number % 3 == 0 else 200, prompt_tokens=call.number)
    results = teacher.continue_texts([ask(prefix=f" {i}", n=3, is_raw=kind == "openai") for i in range(10)])
    usage = total(results)
    assert all(len(result.continuations) == 3 for result in results)
    assert usage.calls == len(server.calls)
    assert usage.prompt_tokens == sum(entry["prompt_tokens"] for entry in server.calls)
    assert usage.completion_tokens == sum(entry["completion_tokens"] for entry in server.calls)
    assert spent().calls == len(server.log)  # the probe's calls are paid for, too
    assert failures() == ["500"] * sum(entry["status"] == 500 for entry in server.calls)


def test_ledger_holds_one_line_a_call_and_a_resumed_run_counts_on(make, server, ask, tmp_path, spent):
    teacher = make()
    teacher.continue_texts([ask(prefix=f" {i}") for i in range(5)])
    before = spent()
    teacher.close()
    lines = [json.loads(line) for line in (tmp_path / "teacher_calls.jsonl").read_text().splitlines()]
    assert len(lines) == len(server.log) == before.calls
    assert sum(line["prompt_tokens"] for line in lines) == sum(entry["prompt_tokens"] for entry in server.log)
    with (tmp_path / "teacher_calls.jsonl").open("a") as file:
        file.write('{"torn": ')  # as a killed run leaves it
    assert spent() == before
    with pytest.raises(BudgetExhausted, match=f"max_calls={before.calls}: {before.calls} calls"):
        make(max_calls=before.calls)
    make()
    lines = (tmp_path / "teacher_calls.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["status"] == "ok"  # on a line of its own


def test_calls_in_flight_are_bounded_and_start_slowly(make, server, ask, faults):
    teacher = make(max_concurrency=6)
    server.most_open_calls, seen = 0, []

    def behave(call):
        seen.append((time.monotonic(), server.open_calls))
        return faults.Answer(delay_s=0.1)

    server.behave = behave
    teacher.continue_texts([ask(prefix=f" {i}") for i in range(24)])
    before_any_answer = [count for at, count in seen if at < seen[0][0] + 0.1]
    assert max(before_any_answer) < 6
    assert server.most_open_calls == 6


def test_one_responses_prefixes_come_in_ascending_order(make, server, ask, faults):
    teacher = make(max_concurrency=4)
    server.behave = lambda call: faults.Answer(delay_s=0.01)
    texts = [[f" r{row}" + " word" * length for length in range(1, 6)] for row in range(8)]
    teacher.continue_texts([ask(prefix=prefix, n=1) for row in texts for prefix in row])
    seen = [entry["call"].body["prompt"] for entry in server.calls]
    for row in texts:
        order = [seen.index("2 + 2" + prefix) for prefix in row]
        assert order == sorted(order)
    # Responses run side by side: the first prefixes of all come before anybody's last.
    assert max(seen.index("2 + 2" + row[0]) for row in texts) < min(seen.index("2 + 2" + row[-1]) for row in texts)


def test_deadline_leaves_what_is_late_missing(make, server, ask, faults):
    teacher = make(step_deadline_s=0.6)
    server.behave = lambda call: faults.Answer(delay_s=5.0 if "slow" in call.body["prompt"] else 0.0)
    start = time.monotonic()
    fast, slow = teacher.continue_texts([ask(prefix=" fast"), ask(prefix=" slow")])
    assert time.monotonic() - start < 3.0
    assert (len(fast.continuations), fast.num_missing) == (3, 0)
    assert (len(slow.continuations), slow.num_missing) == (0, 3)
    assert slow.usage.calls == 1  # it was sent, and may be billed


def test_thirty_percent_failing_at_random_lose_nothing_in_fifty_steps(make, server, ask, faults):
    import random

    rng = random.Random(0)
    teacher = make("openai", max_attempts=14, base_s=0.001, max_concurrency=16)

    def behave(call):
        if rng.random() > 0.3:
            return faults.Answer()
        kind = rng.choice(["429", "500", "529", "reset", "cut", "empty"])
        if kind == "reset":
            return faults.Answer(cut_after=20)
        if kind == "cut":
            return faults.Answer(body=b'{"choices": [{"te')
        if kind == "empty":
            return faults.Answer(body={})
        return faults.Answer(status=int(kind), body={"error": {"message": "busy"}})

    server.behave = behave
    usage = Usage()
    for step in range(50):
        results = teacher.continue_texts([ask(prefix=f" {step} {i}", n=4, seed=step) for i in range(6)])
        assert all(len(result.continuations) == 4 for result in results)
        usage += total(results)
    good = [entry for entry in server.calls if entry.get("answered") and entry["completion_tokens"]]
    assert usage.calls == len(server.calls)
    assert usage.prompt_tokens == sum(entry["prompt_tokens"] for entry in good)
    assert usage.completion_tokens == sum(entry["completion_tokens"] for entry in good)
    assert 0.2 < 1 - len(good) / len(server.calls) < 0.4


def test_teacher_that_dies_in_the_middle_stops_the_run(make, server, ask, faults):
    teacher = make(max_attempts=3)
    teacher.continue_texts([ask(prefix=" one")])
    server.stop()
    with pytest.raises(TeacherStopped, match=r"is down: no call succeeded for .* 3 attempts"):
        teacher.continue_texts([ask(prefix=f" {i}") for i in range(20)])


def test_changed_model_name_stops_the_run(make, server, ask, faults):
    teacher = make()
    server.behave = lambda call: faults.Answer(model="m" if "first" in call.body["prompt"] else "another")
    teacher.continue_texts([ask(prefix=" first")])
    with pytest.raises(TeacherStopped, match=r"answered as 'm' at the start and answers as 'another' now"):
        teacher.continue_texts([ask(prefix=" second")])


def test_caps_are_never_exceeded_and_what_was_in_flight_is_kept(make, server, ask, faults, tmp_path, spent):
    prices = tmp_path / "prices.json"
    prices.write_text('{"prices": [{"model": "m", "input": 1000.0, "output": 1000.0, "date": "2026-11-01"}]}')
    teacher = make(max_calls=12, max_dollars=1e6, prices=str(prices))
    server.behave = lambda call: faults.Answer(delay_s=0.02)
    with pytest.raises(BudgetExhausted, match=r"config\.teacher\.max_calls=12") as stopped:
        teacher.continue_texts([ask(prefix=f" {i}") for i in range(40)])
    assert stopped.value.exit_code == 4
    assert len(server.log) == 12 == spent().calls
    assert spent().dollars == pytest.approx(sum(
        entry["prompt_tokens"] + entry["completion_tokens"] for entry in server.log) / 1000)  # fmt: skip
    teacher.close()
    # The same command with a higher cap pays for the rest alone.
    before = len(server.log)
    again = make(max_calls=1000)
    results = again.continue_texts([ask(prefix=f" {i}") for i in range(40)])
    assert sum(result.num_cached for result in results) == 3 * (before - 1)
    assert len(server.calls) == 40


@pytest.mark.parametrize(
    ("reason", "retry_after"), [("refused", {"retry-after": "20"}), ("refused", {}), ("spent", {})]
)
def test_a_stop_waits_for_what_is_in_flight_and_for_nobody_else(reason, retry_after, make, server, ask, faults):
    calls_of_the_probe = 1
    teacher = make(base_s=20.0, cap_s=20.0, max_calls=calls_of_the_probe + 3 if reason == "spent" else 0)
    assert len(server.log) == calls_of_the_probe

    def behave(call):
        if " busy" in call.body["prompt"]:
            return faults.Answer(status=429, headers=retry_after, body={"error": {"message": "slow down"}})
        if " refused" in call.body["prompt"]:
            return faults.Answer(status=401, delay_s=0.3, body={"error": {"message": "key revoked"}})
        return faults.Answer(delay_s=0.6)

    server.behave = behave
    requests = [ask(prefix=prefix) for prefix in (" busy", f" {reason}", " slow")]
    start = time.monotonic()
    with pytest.raises(TeacherStopped):
        teacher.continue_texts([*requests, *(ask(prefix=f" {i}") for i in range(20))])
    assert 0.5 < time.monotonic() - start < 10.0
    teacher.close()
    (kept,) = make(replay_only=True).continue_texts(requests[-1:])
    assert kept.num_cached == 3


@pytest.mark.parametrize(("cap", "value"), [("max_tokens", 500), ("max_dollars", 0.5)])
def test_token_and_dollar_caps_hold(cap, value, make, server, ask, faults, tmp_path, spent):
    prices = tmp_path / "prices.json"
    prices.write_text('{"prices": [{"model": "m", "input": 1000.0, "output": 1000.0, "date": "2026-11-01"}]}')
    teacher = make(prices=str(prices), max_concurrency=4, **{cap: value})
    server.behave = lambda call: faults.Answer(delay_s=0.01)
    with pytest.raises(BudgetExhausted, match=f"config.teacher.{cap}="):
        teacher.continue_texts([ask(prefix=f" {i}") for i in range(200)])
    total_spent = spent()
    tokens = total_spent.prompt_tokens + total_spent.completion_tokens
    used = total_spent.dollars if cap == "max_dollars" else tokens
    assert 0.7 * value < used <= value


def test_equal_requests_are_paid_for_once(make, server, ask):
    teacher = make()
    first, second = teacher.continue_texts([ask(), ask()])
    assert len(server.calls) == 1
    assert first.continuations == second.continuations
    assert (first.num_cached, second.num_cached) == (0, 3)
    assert second.usage == Usage()


def test_dry_run_sends_nothing(make, server, ask):
    teacher = make(dry_run=True)
    assert "dry run" in teacher.probe()
    with pytest.raises(TeacherStopped, match="dry_run"):
        teacher.continue_texts([ask()])
    assert not server.log


def test_two_threads_share_the_limits(make, server, ask, faults):
    teacher = make(max_concurrency=5)
    server.behave, server.most_open_calls = lambda call: faults.Answer(delay_s=0.02), 0
    threads = [
        threading.Thread(target=teacher.continue_texts, args=([ask(prefix=f" {name} {i}") for i in range(20)],))
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.calls) == 40
    assert server.most_open_calls <= 5


def test_who_is_told_to_stop_sends_nothing_more_and_keeps_what_is_in_flight(make, server, ask, faults):
    teacher = make(max_concurrency=5)
    server.behave = lambda call: faults.Answer(delay_s=2.0)
    requests, ended, before = [ask(prefix=f" {i}") for i in range(20)], [], len(server.calls)

    def asking():
        with pytest.raises(TeacherStopped, match="not asked any more"):
            teacher.continue_texts(requests)
        ended.append(True)

    thread = threading.Thread(target=asking)
    thread.start()
    deadline = time.monotonic() + 30
    while len(server.calls) == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    teacher.stop()
    thread.join()
    assert ended
    sent = len(server.calls) - before
    assert 1 <= sent <= 5
    with pytest.raises(TeacherStopped, match="not asked any more"):
        teacher.continue_texts(requests)
    server.behave = lambda call: faults.Answer()
    again = make()
    before = len(server.calls)
    assert sum(result.num_cached > 0 for result in again.continue_texts(requests)) == sent
    assert len(server.calls) - before == 20 - sent


def test_seeds_of_one_request_differ_and_repeat(make, server, ask):
    teacher = make(max_concurrency=2, mode="completions", capabilities="", cache_path="off")
    teacher.continue_texts([ask(seed=5)])
    teacher.continue_texts([ask(seed=5)])
    seeds = [entry["call"].body["seed"] for entry in server.calls]
    assert seeds[0] == seeds[1] == 5
