"""What the run does for each fault: the table in docs/teachers.md, row by row, in every dialect that has it."""

import re
import time
from pathlib import Path

import pytest

from omniopd_jax.teacher import transport
from omniopd_jax.teacher.protocol import TeacherStopped

KINDS = ("openai", "anthropic", "gemini")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "teachers.md"


def once(faults, bad):
    """The first call after the probe meets `bad`; the others are answered."""
    seen = []

    def behave(call):
        seen.append(call)
        return bad if len(seen) == 1 else faults.Answer()

    return behave


def error(message, **fields):
    return {"error": {"message": message, **fields}}


def retried(faults):
    """Fault name → (answer, counted as). All of these are retried and lose nothing."""
    Answer = faults.Answer
    return {
        "429 without retry-after": (Answer(status=429, body=error("slow down")), "429"),
        "408, 409, 425": (Answer(status=409, body=error("conflict")), "409"),
        "500, 502, 503, 504": (Answer(status=503, body=b"<html>bad gateway</html>", content_type="text/html"), "503"),
        "529 overloaded": (Answer(status=529, body=error("overloaded", type="overloaded_error")), "529"),
        "connection reset in the body": (Answer(cut_after=10), "connection"),
        "truncated JSON": (Answer(body=b'{"choices": [{"text": "a'), "garbled"),
        "`{}` with 200": (Answer(body={}), "garbled"),
        "an HTML page with 200": (Answer(body=b"<html>log in first</html>", content_type="text/html"), "garbled"),
        "a JSON list with 200": (Answer(body=[1, 2]), "garbled"),
        "stall past the timeout": (Answer(delay_s=30.0), "timeout"),
        "slow drip": (Answer(drip_s=0.05), "timeout"),
        "compressed body": (Answer(body=b"\x1f\x8b\x08", headers={"content-encoding": "gzip"}), "too_large"),
    }


RETRIED = [
    "429 without retry-after", "408, 409, 425", "500, 502, 503, 504", "529 overloaded", "connection reset in the body",
    "truncated JSON", "`{}` with 200", "an HTML page with 200", "a JSON list with 200", "stall past the timeout",
    "slow drip", "compressed body",
]  # fmt: skip
STOPPED = {
    "401, 403": (403, error("key revoked")),
    "402 or spent credit": (402, error("Insufficient Balance")),
    "spent credit, OpenAI": (429, error("You exceeded your current quota", code="insufficient_quota")),
    "spent credit, Anthropic": (400, error("Your credit balance is too low", type="invalid_request_error")),
    "quota of the day, Google": (
        429,
        error(
            "You exceeded your current quota",
            details=[{"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel"}]}],
        ),
    ),
}
OTHERS = [
    "429 with retry-after", "400, 404, 413, 422", "3xx redirect", "100 MB body", "empty text, cut at the length",
    "empty text, ended at once", "refusal", "another model's name", "fewer choices than n", "more choices than n",
    "a choice twice", "wrong content type, sound JSON", "down at the start", "down in the middle",
    "30 % of calls fail at random",
]  # fmt: skip


def test_the_documented_table_is_what_is_tested():
    section = DOCS.read_text(encoding="utf-8").split("## Faults", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+?) \|", section, flags=re.M)
    named = {row for row in rows if row not in ("fault", "---")}
    assert named == {*RETRIED, *STOPPED, *OTHERS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RETRIED)
def test_retried(kind, name, make, server, ask, faults, failures):
    answer, reason = retried(faults)[name]
    teacher = make(kind)
    teacher._config = type(teacher._config)(**{**vars(teacher._config), "request_timeout_s": 0.4})
    server.behave = once(faults, answer)
    (result,) = teacher.continue_texts([ask(n=1, is_raw=kind == "openai")])
    assert len(result.continuations) == 1
    assert result.num_missing == 0
    assert result.usage.calls == len(server.calls) == 2
    assert failures() == [reason]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STOPPED)
def test_stops_at_once(kind, name, make, server, ask, faults):
    status, body = STOPPED[name]
    teacher = make(kind)
    server.behave = lambda call: faults.Answer(status=status, body=body)
    with pytest.raises(TeacherStopped, match=f"refuses to go on: HTTP {status}") as stopped:
        teacher.continue_texts([ask(prefix=f" {i}", n=1, is_raw=kind == "openai") for i in range(30)])
    assert stopped.value.exit_code == 3
    assert len(server.calls) <= 8  # what was in flight, no second attempt


RETRY_AFTER = {
    "openai": ({"retry-after": "0.5"}, error("slow down")),
    "anthropic": ({"retry-after-ms": "500"}, error("slow down")),
    "gemini": (
        {},
        error("quota", details=[{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.5s"}]),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_429_with_retry_after_holds_everybody_that_long(kind, make, server, ask, faults):
    headers, body = RETRY_AFTER[kind]
    teacher = make(kind, max_concurrency=1)
    times = []

    def behave(call):
        times.append(time.monotonic())
        return faults.Answer(status=429, headers=headers, body=body) if len(times) == 1 else faults.Answer()

    server.behave = behave
    results = teacher.continue_texts([ask(prefix=f" {i}", n=1, is_raw=kind == "openai") for i in range(3)])
    assert all(len(result.continuations) == 1 for result in results)
    assert times[1] - times[0] >= 0.45
    assert len(times) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_refused_request_is_missing_and_the_others_go_on(kind, status, make, server, ask, faults):
    teacher = make(kind)
    server.behave = lambda call: (
        faults.Answer(status=status, body=error("too long")) if "long" in str(call.body) else faults.Answer()
    )
    bad, good = teacher.continue_texts([ask(prefix=p, n=1, is_raw=kind == "openai") for p in (" long", " short")])
    assert (len(bad.continuations), bad.num_missing, bad.usage.calls) == (0, 1, 1)
    assert len(good.continuations) == 1


def test_redirects_are_not_followed(make, server, ask, faults):
    teacher = make()
    target = "http://127.0.0.1:1/v1"
    server.behave = lambda call: (
        faults.Answer(status=307, headers={"location": target}, body={}) if " a" in call.body["prompt"] else
        faults.Answer()
    )  # fmt: skip
    moved, _ = teacher.continue_texts([ask(prefix=" a"), ask(prefix=" b")])
    assert (moved.num_missing, moved.usage.calls) == (3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_body_is_not_read(kind, make, server, ask, faults, failures):
    teacher = make(kind)
    server.behave = once(faults, faults.Answer(pad_bytes=100 * 2**20))
    (result,) = teacher.continue_texts([ask(n=1, is_raw=kind == "openai")])
    assert len(result.continuations) == 1
    assert failures() == ["too_large"]
    assert transport.MAX_REPLY_BYTES <= 2**23


@pytest.mark.parametrize("kind", KINDS)
def test_empty_text_at_the_length_is_missing_and_not_asked_again(kind, make, server, ask, faults):
    teacher = make(kind)
    server.behave = lambda call: faults.Answer(texts=["" if "cut" in str(call.body) else "fine"])
    cut, fine = teacher.continue_texts([ask(prefix=p, n=1, is_raw=kind == "openai") for p in (" cut", " short")])
    assert (len(cut.continuations), cut.num_missing, cut.num_refused) == (0, 1, 0)
    assert len(fine.continuations) == 1
    assert len(server.calls) == 2


@pytest.mark.parametrize(("kind", "mode"), [("openai", "completions"), ("anthropic", "prefill"), ("gemini", "prefill")])
def test_empty_text_of_an_answer_that_ends_at_once_counts(kind, mode, make, server, ask, faults):
    teacher = make(kind, mode=mode)
    server.behave = lambda call: faults.Answer(texts=[""] * call.n, finish="stop", completion_tokens=call.n)
    (ended,) = teacher.continue_texts([ask(n=2, is_raw=kind == "openai")])
    assert [(found.text, found.finish_reason) for found in ended.continuations] == [("", "stop")] * 2
    # ... but not where thoughts ate the tokens.
    server.behave = lambda call: faults.Answer(texts=["" if call.n == 1 else "x"] * call.n, finish="stop",
                                               completion_tokens=8 * call.n)  # fmt: skip
    thought, _ = teacher.continue_texts(
        [ask(n=1, prefix=" other", is_raw=kind == "openai"), ask(n=3, prefix=" third", is_raw=kind == "openai")]
        if kind == "openai"
        else [ask(n=1, prefix=" other", is_raw=False), ask(n=1, prefix=" fourth", is_raw=False)]
    )
    assert (len(thought.continuations), thought.num_missing) == (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_refusals_are_missing_counted_and_kept(kind, make, server, ask, faults):
    teacher = make(kind)
    server.behave = lambda call: faults.Answer(finish="refused" if "bad" in str(call.body) else "length")
    requests = [ask(prefix=p, n=1, is_raw=kind == "openai") for p in (" bad", " good")]
    bad, good = teacher.continue_texts(requests)
    assert (len(bad.continuations), bad.num_missing, bad.num_refused) == (0, 1, 1)
    assert len(good.continuations) == 1
    again, _ = teacher.continue_texts(requests)
    assert again.num_refused == 1
    assert len(server.calls) == 2  # asking again would cost again


def test_all_choices_blocked_by_google(make, server, ask, faults):
    teacher = make("gemini")
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "modelVersion": "gemini-2.5-flash", "usageMetadata": {}}
    server.behave = lambda call: faults.Answer(body=blocked) if "bad" in str(call.body) else faults.Answer()
    bad, _ = teacher.continue_texts([ask(prefix=p, n=1, is_raw=False) for p in (" bad", " good")])
    assert (bad.num_missing, bad.num_refused) == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_another_models_name_stops(kind, make, server, ask, faults):
    teacher = make(kind)
    server.behave = lambda call: faults.Answer(model="someone-else")
    with pytest.raises(TeacherStopped, match="that is another teacher"):
        teacher.continue_texts([ask(is_raw=kind == "openai")])


def test_fewer_choices_are_topped_up(make, server, ask, faults):
    teacher = make()
    server.behave = lambda call: faults.Answer(texts=[f"{call.number}{i}" for i in range(max(1, call.n - 2))])
    (result,) = teacher.continue_texts([ask(n=5)])
    assert len({found.text for found in result.continuations}) == 5
    assert [entry["call"].n for entry in server.calls] == [5, 2, 1]
    assert len({entry["call"].body["seed"] for entry in server.calls}) == 3


def test_more_choices_than_asked_for_are_cut(make, server, ask, faults):
    teacher = make()
    server.behave = lambda call: faults.Answer(texts=[str(i) for i in range(call.n + 2)])
    (result,) = teacher.continue_texts([ask(n=3)])
    assert [found.text for found in result.continuations] == ["0", "1", "2"]


def test_a_choice_twice_counts_once(make, server, ask, faults):
    teacher = make()
    server.behave = once(faults, faults.Answer(texts=["a", "a", "b"], indices=[0, 0, 1]))
    (result,) = teacher.continue_texts([ask(n=3)])
    assert len(result.continuations) == 3
    assert [entry["call"].n for entry in server.calls] == [3, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_marked_and_kept(kind, make, server, ask, faults):
    teacher = make(kind, step_deadline_s=10.0)
    server.behave = lambda call: faults.Answer(texts=["half \ud83d of it"])
    request = ask(n=1, is_raw=kind == "openai")
    for num_cached in (0, 1):
        (result,) = teacher.continue_texts([request])
        assert [found.text.strip() for found in result.continuations] == ["half \N{REPLACEMENT CHARACTER} of it"]
        assert result.num_cached == num_cached


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_content_type_of_sound_json_is_read(kind, make, server, ask, faults, failures):
    teacher = make(kind)
    server.behave = lambda call: faults.Answer(content_type="text/plain")
    (result,) = teacher.continue_texts([ask(n=1, is_raw=kind == "openai")])
    assert len(result.continuations) == 1
    assert not failures()


@pytest.mark.parametrize("kind", KINDS)
def test_down_at_the_start_is_told_within_seconds(kind, make, server):
    server.stop()
    teacher = make(kind, probed=False)
    start = time.monotonic()
    with pytest.raises(TeacherStopped, match="does not answer: ConnectionRefusedError"):
        teacher.probe()
    assert time.monotonic() - start < 10.0


def test_nothing_at_all_within_the_deadline_stops(make, server, ask, faults):
    teacher = make(step_deadline_s=0.5)
    server.behave = lambda call: faults.Answer(delay_s=30.0)
    with pytest.raises(TeacherStopped, match="not one continuation arrived"):
        teacher.continue_texts([ask()])
