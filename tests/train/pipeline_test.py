"""Overlap changes when things happen and nothing else."""

import functools
import os
import signal
import threading
import time
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from omniopd_jax.config import ConfigError
from omniopd_jax.teacher.protocol import BudgetExhausted, Continuation, TeacherStopped
from omniopd_jax.teacher.scripted import ScriptedTeacher
from omniopd_jax.train import audit, loop, pipeline, tally
from omniopd_jax.train.distributed import PeerStopped
from omniopd_jax.train.pipeline import overlapped
from omniopd_jax.train.stops import Interrupted
from omniopd_jax.train.update import Update
from tests.train.conftest import read_lines, tiny_config


def alone(work):
    return work()


def test_results_come_in_the_order_of_the_items():
    delays = [0.05, 0.0, 0.02]

    def slow(delay):
        time.sleep(delay)
        return delay

    assert list(overlapped(iter(delays), slow, meet=alone)) == delays


def test_an_item_is_made_while_the_one_before_is_worked_on():
    is_made = threading.Event()

    def items():
        yield 1
        is_made.set()
        yield 2

    def work(item):
        assert item == 2 or is_made.wait(10), "the second item waits for the first one's work"
        return item

    assert list(overlapped(items(), work, meet=alone)) == [1, 2]


def test_no_result_is_handed_on_once_another_work_has_failed():
    """Of a batch that was not sampled to its end nothing can be learnt: not even what is answered."""
    has_failed = threading.Event()

    def items():
        yield 0
        yield 1
        assert has_failed.wait(10)
        time.sleep(0.2)
        yield 2
        yield 3

    def work(number):
        if number == 1:
            has_failed.set()
            raise BudgetExhausted("spent")

    with pytest.raises(BudgetExhausted, match="spent"):
        next(overlapped(items(), work, meet=alone))


def test_a_failure_is_raised_while_an_earlier_work_goes_on():
    released = threading.Event()

    def work(number):
        if number == 1:
            raise RuntimeError("a bug")
        assert released.wait(10)

    def give_up(error):
        released.set()
        return False

    with pytest.raises(RuntimeError, match="a bug"):
        next(overlapped([0, 1], work, meet=alone, give_up=give_up))
    assert released.is_set()


def test_a_result_is_there_while_the_next_is_worked_on():
    is_taken = threading.Event()

    def work(item):
        assert item == 1 or is_taken.wait(10), "the first result waits for the second one's work"
        return item

    results = overlapped([1, 2], work, meet=alone)
    assert next(results) == 1
    is_taken.set()
    assert next(results) == 2


@pytest.mark.parametrize("to_the_end", [False, True])
def test_a_failure_is_raised_and_other_processes_are_not_left_alone(to_the_end):
    made, given_up = [], []

    def items():
        for number in range(4):
            made.append(number)
            yield number
            time.sleep(0.05)

    def work(number):
        raise TeacherStopped(f"no answer to {number}")

    with pytest.raises(TeacherStopped, match="no answer to 0"):
        list(overlapped(items(), work, meet=alone, give_up=given_up.append, to_the_end=to_the_end))
    assert made == [0, 1, 2, 3] if to_the_end else len(made) < 4
    assert not given_up, "nobody works any more"


class Slow(ScriptedTeacher):
    """Works on a question until it is released; `stop` leaves it at that, `cancel` releases it."""

    is_concurrent = True

    def __init__(self):
        super().__init__(lambda request: [])
        self.works, self.released, self.told = threading.Event(), threading.Event(), []

    def continue_texts(self, requests):
        self.works.set()
        assert self.released.wait(10)
        return []

    def stop(self):
        self.told.append("stop")
        threading.Timer(0.2, self.released.set).start()

    def cancel(self):
        self.told.append("cancel")
        self.released.set()


def given_up(error, *, here=True):
    """A teacher that works on the second part when `error` ends the first: in its own work, or where all meet."""
    teacher = Slow()
    lock = threading.Lock()
    shared = pipeline.Shared(teacher, lock)

    def fail():
        assert teacher.works.wait(10)
        raise error

    def work(number):
        if number == 1:
            with lock:
                return shared.continue_texts([])
        return fail() if here else None

    def meet(work):
        found = work()
        return found if here else fail()

    with pytest.raises(type(error), match=str(error)):
        list(overlapped([0, 1], work, meet=meet, give_up=shared.give_up, to_the_end=True))
    assert lock.acquire(timeout=10)
    with pytest.raises(TeacherStopped, match="given up"):
        shared.continue_texts([])
    return teacher


def test_a_bug_cuts_off_what_still_works():
    assert given_up(RuntimeError("a bug")).told == ["cancel"]


@pytest.mark.parametrize("error", [TeacherStopped("gone"), BudgetExhausted("spent")])
def test_answers_in_flight_are_waited_for_when_the_teacher_stops(error):
    teacher = given_up(error)
    assert teacher.told == ["stop"]
    assert teacher.released.is_set(), "the second answer was paid for"


@pytest.mark.parametrize(("exit_code", "told"), [(3, "stop"), (143, "cancel")])
def test_a_stop_of_another_process_waits_for_answers_and_a_signal_to_it_does_not(exit_code, told):
    assert given_up(PeerStopped(1, "gone", exit_code), here=False).told == [told]


def test_who_takes_no_more_results_stops_what_still_works():
    teacher = Slow()
    shared = pipeline.Shared(teacher, threading.Lock())

    def work(number):
        if number:
            with shared._lock:
                shared.continue_texts([])

    results = overlapped([0, 1], work, meet=alone, give_up=shared.give_up)
    next(results)
    assert teacher.works.wait(10)
    results.close()
    assert teacher.told == ["cancel"]


def test_a_signal_during_that_wait_cuts_it_short_and_the_first_reason_stays():
    teacher, waits = Slow(), []
    teacher.stop = lambda: teacher.told.append("stop")
    lock = threading.Lock()
    shared = pipeline.Shared(teacher, lock)

    @contextmanager
    def waiting():
        waits.append(1)
        if len(waits) == 2:
            raise Interrupted(signal.SIGTERM)
        yield

    def work(number):
        if number == 1:
            with lock:
                return shared.continue_texts([])
        assert teacher.works.wait(10)
        raise TeacherStopped("gone")

    with pytest.raises(TeacherStopped, match="gone"):
        list(overlapped([0, 1], work, meet=alone, waiting=waiting, give_up=shared.give_up, to_the_end=True))
    assert teacher.told == ["stop", "cancel"]


@pytest.mark.parametrize(
    ("rows", "parts", "asked", "shares", "size"),
    [
        (32, 1, 0, 1, 32),
        (32, 4, 0, 1, 8),
        (32, 4, 4, 2, 4),
        (24, 8, 8, 1, 3),
        (96, 8, 32, 4, 12),
        (24, 2, 8, 4, 4),
        (48, 8, 4, 2, 2),
        (24, 2, 8, 1, 6),
        (16, 1, 2, 4, 4),
    ],
)
def test_a_micro_batch_is_the_most_that_divides_a_part_and_the_mesh(rows, parts, asked, shares, size):
    names = {"rollout.batch_size": rows, "pipeline.micro_batches": parts, "train.micro_batch_size": asked}
    assert pipeline.micro_batch(tiny_config(**names), shares) == size


def test_older_parameters_are_refused_with_the_reason():
    config = tiny_config(**{"pipeline.staleness": 1})
    with pytest.raises(ConfigError, match=r"config\.pipeline\.staleness=1 must be 0: .*raise config\.pipeline"):
        pipeline.check_staleness(config)


def two_texts(request):
    texts = ("add 1 and 2 with 0 gives", "7 plus 5 makes 1 2")
    return [Continuation(texts[(request.seed + i) % 2], "length") for i in range(request.n)]


class SlowTeacher(ScriptedTeacher):
    """Says one of two things, by the request's seed, after a while; several threads may ask."""

    is_concurrent = True

    def __init__(self, delay_s=0.05, error=None):
        super().__init__(two_texts)
        self.delay_s = delay_s
        self.error = error
        self.at_once = self.most_at_once = 0
        self.cancelled = threading.Event()

    def continue_texts(self, requests):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.cancelled.wait(self.delay_s)
        self.at_once -= 1
        if self.error is not None:
            raise self.error
        return super().continue_texts(requests)

    def stop(self):
        pass

    def cancel(self):
        self.cancelled.set()


@pytest.fixture(scope="module")
def distil(tmp_path_factory, model, tokenizer, prompts):
    compiled = str(tmp_path_factory.mktemp("compiled"))

    def run(workdir, teacher, **overrides):
        config = tiny_config(**{"train.compilation_cache": compiled, "train.steps": 2} | overrides)
        return loop.run(config, workdir, student=model, tokenizer=tokenizer, teacher=teacher, prompts=prompts)

    return run


@pytest.fixture(scope="module")
def side_by_side(distil, tmp_path_factory):
    workdir, teacher = tmp_path_factory.mktemp("overlapped"), SlowTeacher(0.3)
    return workdir, distil(workdir, teacher, **{"pipeline.micro_batches": 4}), teacher


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 6, 8, 16])
def test_a_rollout_takes_as_many_responses_as_all_before_it(parts):
    rows = pipeline.rows_sampled(tiny_config(**{"rollout.batch_size": 3 * parts, "pipeline.micro_batches": parts}))
    assert sum(rows) == 3 * parts
    assert rows[0] == 3
    for number in range(1, len(rows) - 1):
        assert rows[number] == sum(rows[:number])
    assert rows[-1] <= sum(rows[:-1]) or parts == 1


def test_as_many_are_decoded_side_by_side_as_a_rollout_or_its_slots_have():
    given = {"rollout.batch_size": 24, "pipeline.micro_batches": 8}  # rollouts of 3, 3, 6 and 12
    for slots, rows in ((0, 12), (4, 4), (12, 12), (20, 12)):
        assert pipeline.rows_decoded(tiny_config(**given, **{"rollout.slots": slots})) == rows


def test_the_config_may_say_how_many_rollouts_there_are_but_not_for_an_arm_without_chunks():
    given = {"rollout.batch_size": 24, "pipeline.micro_batches": 8}
    assert pipeline.rows_sampled(tiny_config(**given, **{"pipeline.rollouts": 2})) == [12, 12]
    assert pipeline.rows_sampled(tiny_config(**given, **{"pipeline.rollouts": 8})) == [3] * 8
    no_chunks = {"objective.arm": "sft", "objective.anchor_weight": 0.0}
    for rollouts in (0, 4):
        assert pipeline.rows_sampled(tiny_config(**given, **{"pipeline.rollouts": rollouts}, **no_chunks)) == [24]


@pytest.mark.parametrize("rollouts", [1, 2, 4])
def test_what_is_sampled_together_may_be_audited_and_learnt_from_in_parts(side_by_side, distil, tmp_path, rollouts):
    workdir, _, _ = side_by_side
    distil(tmp_path, SlowTeacher(0.0), **{"pipeline.micro_batches": 4, "pipeline.rollouts": rollouts})
    for ours, theirs in zip(lines_of(tmp_path, "metrics"), lines_of(workdir, "metrics"), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def one_after_the_other(first, second, *, meet, **options):
    del options
    for item in list(first):
        yield meet(functools.partial(second, item))


def lines_of(workdir, name):
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "compile/")) and "seconds" not in key
        }
        for line in read_lines(workdir / f"{name}.jsonl")
    ]


def test_overlapped_or_one_after_the_other_is_bitwise_the_same(side_by_side, distil, monkeypatch, tmp_path):
    workdir, result, teacher = side_by_side
    assert teacher.most_at_once > 1, "the teacher was asked side by side"
    monkeypatch.setattr(pipeline, "overlapped", one_after_the_other)
    alone = distil(tmp_path, SlowTeacher(0.0), **{"pipeline.micro_batches": 4})
    jax.tree.map(np.testing.assert_array_equal, result.model.params, alone.model.params)
    for name in ("metrics", "audits", "rollouts"):
        assert lines_of(workdir, name) == lines_of(tmp_path, name), name


def test_gradients_are_taken_while_the_teacher_works_on_the_last_part(side_by_side, distil, monkeypatch, tmp_path):
    taken, here, ask, add = [], threading.local(), audit.ask, Update.add

    class Patient(SlowTeacher):
        """Answers the last part of a step once the gradients of the others are under way."""

        def continue_texts(self, requests):
            deadline = time.monotonic() + 60
            while here.is_last and len(taken) % 4 < 3:
                assert time.monotonic() < deadline, f"{len(taken)} parts are learnt from"
                time.sleep(0.01)
            return super().continue_texts(requests)

    def asking(experiment, part, *rest):
        here.is_last = part.batch.sample_index_B[-1] % 8 == 7
        return ask(experiment, part, *rest)

    def taking(update, tree):
        add(update, tree)
        taken.append(len(tree.tokens_BxT))

    monkeypatch.setattr(audit, "ask", asking)
    monkeypatch.setattr(Update, "add", taking)
    result = distil(tmp_path, Patient(0.0), **{"pipeline.micro_batches": 4})
    assert taken == [2] * 8
    jax.tree.map(np.testing.assert_array_equal, result.model.params, side_by_side[1].model.params)


def test_the_split_changes_no_question_and_no_figure(side_by_side, distil, tmp_path):
    workdir, result, _ = side_by_side
    whole = distil(tmp_path, SlowTeacher(0.0))
    texts = ("step", "response", "prompt_id", "slot", "start", "chunk", "continuations", "count")
    for ours, theirs in zip(read_lines(workdir / "audits.jsonl"), read_lines(tmp_path / "audits.jsonl"), strict=True):
        assert [ours[name] for name in texts] == [theirs[name] for name in texts]
    for ours, theirs in zip(lines_of(workdir, "metrics"), lines_of(tmp_path, "metrics"), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert result.teacher == whole.teacher


def test_a_teacher_that_stops_in_its_thread_stops_the_run(distil, tmp_path):
    with pytest.raises(TeacherStopped, match="gone"):
        distil(tmp_path, SlowTeacher(0.0, TeacherStopped("gone")), **{"pipeline.micro_batches": 4})
    assert os.listdir(tmp_path / "checkpoints") == ["0"]


def test_a_signal_does_not_wait_for_the_teacher(distil, tmp_path):
    teacher = SlowTeacher(120.0)
    threading.Timer(0.1, lambda: _when(lambda: teacher.at_once > 0)).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        distil(tmp_path, teacher, **{"pipeline.micro_batches": 4})
    assert time.monotonic() - began < 60
    assert teacher.cancelled.is_set()


def _when(condition):
    while not condition():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def test_every_metric_of_an_audit_says_how_parts_make_a_whole(side_by_side):
    """A name that this table does not know would stop a run of several processes."""
    workdir, _, _ = side_by_side
    known = {*tally._COUNTS, *tally._SECONDS, *tally._MEAN_OVER, tally._LEDGER}
    line = read_lines(workdir / "metrics.jsonl")[0]
    totals = {name for name in line if name.startswith("teacher/total_")}
    of_the_arm = {"audit/fraction", "audit/audited", "audit/entropy", "audit/prior", "audit/target", "audit/advantage"}
    found = {name for name in line if name.startswith(("audit/", "teacher/"))} - totals - of_the_arm
    assert found <= known
