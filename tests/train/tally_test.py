"""Numbers of parts make those of the whole, whether one teacher is asked in turn or several processes ask at once."""

from types import SimpleNamespace

import numpy as np
import pytest

from omniopd_jax.teacher.protocol import Continuation, ContinuationResult, Usage
from omniopd_jax.teacher.scripted import ScriptedTeacher
from omniopd_jax.teacher.verify import VerifySettings, usage_metrics
from omniopd_jax.train import answers, distributed, tally
from omniopd_jax.train.stops import Interrupts
from omniopd_jax.types import Message, Prompt, PromptBatch

SAMPLES = 3


def results_of(rng, requests):
    """What a teacher may send to so many requests of SAMPLES samples."""
    found = []
    for _ in range(requests):
        received = int(rng.integers(0, SAMPLES + 1))
        found.append(
            ContinuationResult(
                continuations=(Continuation("a", "length"),) * received,
                num_missing=SAMPLES - received,
                num_refused=int(rng.integers(0, SAMPLES - received + 1)),
                num_cached=int(rng.integers(0, received + 1)),
                usage=Usage(*map(int, rng.integers(0, 50, 2)), calls=1, dollars=float(rng.random())),
                latency_s=float(rng.random()),
            )
        )
    return found


def metrics_of(results):
    received = sum(len(result.continuations) for result in results)
    return usage_metrics(results, SAMPLES * len(results), received)


def paying(dollars):
    return SimpleNamespace(paid=Usage(dollars=dollars))


@pytest.fixture
def parts():
    """Of 5, 2 and 0 requests; what they cost together is the last ledger where it is one, the sum where each has its
    own."""
    rng = np.random.default_rng(0)
    results = [results_of(rng, requests) for requests in (5, 2, 0)]
    ledgers, seconds = (1.0, 2.5, 4.0), (3.0, 1.0, 2.0)
    tallies = [
        tally.taken(metrics_of(part) | {"teacher/seconds": took}, paying(paid), requests=len(part))
        for part, took, paid in zip(results, seconds, ledgers, strict=True)
    ]
    return results, tallies


@pytest.mark.parametrize(
    ("merge", "seconds", "dollars"), [(tally.in_turn, 6.0, 4.0), (tally.at_once, 3.0, 7.5)], ids=["in_turn", "at_once"]
)
def test_the_whole_is_what_all_calls_together_are(parts, merge, seconds, dollars):
    results, tallies = parts
    found = merge(tallies).metrics
    expected = metrics_of([result for part in results for result in part])
    assert found == pytest.approx(expected | {"teacher/seconds": seconds, "teacher/total_dollars": dollars})


def test_parts_of_parts_are_parts(parts):
    _, tallies = parts
    assert tally.in_turn([tally.in_turn(tallies[:2]), tallies[2]]).metrics == pytest.approx(
        tally.in_turn(tallies).metrics
    )


def test_one_part_stays_as_it_is_and_none_is_nothing(parts):
    _, (first, *_) = parts
    assert tally.at_once([first]) is first
    assert tally.in_turn([]).metrics == {}


def test_a_teacher_without_a_ledger_has_no_total():
    assert "teacher/total_dollars" not in tally.taken(metrics_of([]), object(), requests=0).metrics


def test_answers_that_processes_wait_for_at_once_take_as_long_as_the_slowest(monkeypatch, tokenizer):
    """Two processes, each asked here in the other's place."""
    prompts = tuple(Prompt(f"p{row}", (Message("user", f"p{row}"),)) for row in range(4))
    none = np.zeros((4, 1), np.int32)
    teacher = ScriptedTeacher(lambda request: [Continuation("answer 7", "stop")])
    teacher.paid = Usage(dollars=2.0)  # of each
    experiment = SimpleNamespace(
        tokenizer=tokenizer,
        teacher=teacher,
        verify_settings=VerifySettings(chunk_tokens=2, num_continuations=1, temperature=1.0, token_slack=1.5),
        config=SimpleNamespace(rollout=SimpleNamespace(max_new_tokens=6), train=SimpleNamespace(seed=0)),
    )
    batch = PromptBatch(prompts, none, none > 0, np.arange(4, dtype=np.int32))

    def of_process(rows):
        monkeypatch.setattr(distributed, "share", lambda count: rows)
        return answers.answers_of(experiment, batch, step=1, interrupts=Interrupts())

    alone = [of_process(range(2)), of_process(range(2, 4))]
    monkeypatch.setattr(distributed, "collect", lambda part: alone)
    together, asked = of_process(range(2))
    np.testing.assert_array_equal(together.mask_BxT.sum(axis=1), [3] * 4)  # two words and the stop token
    seconds = [part.metrics["teacher/seconds"] for _, part in alone]
    assert asked.metrics["teacher/seconds"] == max(seconds) < sum(seconds)
    assert asked.metrics["teacher/requested"] == 4
    assert asked.metrics["teacher/total_dollars"] == 4.0
