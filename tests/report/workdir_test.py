"""Reading a work directory: at rest, in use, after a crash."""

import json

import pytest

from omniopd_jax.report.workdir import read_workdir, repetition
from tests.report import synthetic


def write_lines(path, *lines):
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n"
    )


def test_a_folder_without_a_runs_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no work directory"):
        read_workdir(tmp_path)


def test_steps_ascend_and_hold_what_was_written(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", {"step": 2, "a/b": 2}, {"step": 1, "a/b": 1.5}, {"step": 3, "c/d": 3})
    run = read_workdir(tmp_path)
    assert run.metrics == {1: {"a/b": 1.5}, 2: {"a/b": 2.0}, 3: {"c/d": 3.0}}
    assert run.series("a/b") == ([1, 2], [1.5, 2.0])
    assert run.remarks == []


def test_a_step_written_twice_holds_the_later_values_and_keeps_the_rest(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", {"step": 1, "a/b": 1, "a/c": 7}, {"step": 1, "a/b": 2})
    assert read_workdir(tmp_path).metrics == {1: {"a/b": 2.0, "a/c": 7.0}}


@pytest.mark.parametrize(
    "line", [b'{"step": 1, "a/b": NaN}', b'{"step": 1, "a/b": null}', b'{"step": 1, "a/b": "inf"}']
)
def test_what_is_not_finite_is_kept_apart(tmp_path, line):
    write_lines(tmp_path / "metrics.jsonl", line)
    run = read_workdir(tmp_path)
    assert run.metrics == {1: {}}
    assert run.not_finite == {"a/b": [1]}


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    whole = b'{"step": 1, "a/b": 1}\n'
    for end in range(1, len(whole) - 2):
        (tmp_path / "metrics.jsonl").write_bytes(whole + whole[:end])
        run = read_workdir(tmp_path)
        assert run.metrics == {1: {"a/b": 1.0}}
        assert "incomplete" in run.remarks[0]


def test_a_last_line_that_only_lacks_its_end_is_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a/b": 1}\n{"step": 2, "a/b": 2}')
    run = read_workdir(tmp_path)
    assert list(run.metrics) == [1, 2]
    assert run.remarks == []


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b"nonsense",
        b"[" * 100_000,
        b'{"step": "1"}',
        b'{"step": -1}',
        b'{"step": 1.5}',
        b'{"step": true}',
        b'{"a": 1}',
    ],
)
def test_lines_that_are_no_steps_are_counted_and_skipped(tmp_path, line):
    write_lines(tmp_path / "metrics.jsonl", line, {"step": 4, "a/b": 1})
    run = read_workdir(tmp_path)
    assert list(run.metrics) == [4]
    assert run.remarks == ["1 of the lines of metrics.jsonl could not be read and were left out."]


def test_broken_utf8_and_lone_surrogates_become_replacement_characters(tmp_path):
    write_lines(
        tmp_path / "rollouts.jsonl",
        b'{"step": 1, "response": 0, "prompt_id": "a\xff\xc3", "prompt": "b"}',
        b'{"step": 1, "response": 1, "prompt_id": "\\ud800x", "prompt": "b"}',
    )
    ids = [response.prompt_id for response in read_workdir(tmp_path).responses.values()]
    assert ids == ["a\ufffd\ufffd", "\ufffdx"]


def test_rollouts_and_audits_of_a_response_come_together(tmp_path):
    synthetic.write_run(tmp_path, steps=3, responses=2)
    run = read_workdir(tmp_path)
    assert list(run.responses) == [(step, row) for step in (1, 2, 3) for row in (0, 1)]
    lines = [json.loads(line) for line in (tmp_path / "audits.jsonl").read_text().splitlines()]
    for line in lines:
        audit = run.responses[line["step"], line["response"]].audits[line["slot"]]
        assert run.read("audits.jsonl", audit.span) == line
        assert audit.similarity == pytest.approx(line["score_sum"] / line["count"], rel=1e-5)
        assert audit.is_unanimous == (len({each["text"] for each in line["continuations"]}) == 1)
    assert sum(len(response.audits) for response in run.responses.values()) == len(lines)


def test_a_damaged_run_is_read_as_far_as_it_goes(tmp_path):
    synthetic.write_run(tmp_path, steps=4, responses=2, hostile=True)
    run = read_workdir(tmp_path)
    assert len(run.responses) == 8
    assert any("audits.jsonl could not be read" in remark for remark in run.remarks)
    assert sum("incomplete" in remark for remark in run.remarks) == 3


def test_repetition_is_the_share_of_runs_seen_before():
    assert repetition(list("abcdefg")) == 0
    assert repetition(["a"] * 13) == pytest.approx(0.9)  # ten runs, one of them new
    assert repetition(["a"] * 4) is None
    assert repetition("aaaaaaaa") is None
