"""The cache: first answers stay, nothing is lost, processes share it, its lines come back the same."""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from omniopd_jax.teacher.cache import Cache, Row, sample_keys
from omniopd_jax.teacher.protocol import TeacherStopped

ROOT = Path(__file__).resolve().parents[2]


def row(key, text="text", **changes):
    values = {"teacher": "openai:m", "mode": "completions", "model": "m", "finish": "length"}
    return Row(key=key, text=text, prompt_tokens=2.5, completion_tokens=1.0, created=time.time(), **(values | changes))


def test_first_answer_stays_and_is_on_disk_when_the_future_is_done(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    cache.put([row("a", "first")]).result()
    cache.put([row("a", "second"), row("b", "ünï\ud800".encode("utf-8", "replace").decode())]).result()
    other = Cache(tmp_path / "c.sqlite")  # another connection sees it at once
    assert {key: kept.text for key, kept in other.get(["a", "b", "c"]).items()} == {"a": "first", "b": "ünï?"}
    other.close()
    cache.close()


def test_what_cannot_be_stored_is_told_and_the_writer_lives_on(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    with pytest.raises(OSError, match=r"c\.sqlite: .*surrogates not allowed"):
        cache.put([row("a"), row("b", "half \ud83d")]).result(10.0)
    cache.put([row("c")]).result(10.0)
    assert set(cache.get(["a", "b", "c"])) == {"c"}
    cache.close()


def test_many_keys_are_looked_up(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    cache.put([row(f"{i}") for i in range(2345)]).result()
    assert len(cache.get([f"{i}" for i in range(3000)])) == 2345
    cache.close()


def _write(path, name):
    cache = Cache(path)
    for i in range(50):
        cache.put([row(f"{name}{i}"), row(f"both{i}", name)]).result()
    cache.close()


def test_processes_share_one_file(tmp_path):
    path = tmp_path / "c.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, name)) for name in ("x", "y")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    cache = Cache(path)
    assert sum(entry["samples"] for entry in cache.stats()) == 150
    cache.close()


def test_keys_tell_apart_what_differs_and_nothing_else():
    def keys(**changes):
        values = {"teacher": "openai:m", "answered": "m", "mode": "completions", "body": {"prompt": "p", "t": 1.0},
                  "seed": 1, "n": 3}  # fmt: skip
        return sample_keys(**(values | changes))

    assert keys() == keys(body={"t": 1.0, "prompt": "p"})
    assert keys(n=2) == keys()[:2]
    assert len(set(keys())) == 3
    for change in (
        {"teacher": "openai:o"}, {"answered": "m-2"}, {"mode": "prefill"}, {"seed": 2}, {"body": {"prompt": "q"}},
        {"body": {"prompt": "p", "t": 0.5}},
    ):  # fmt: skip
        assert not set(keys(**change)) & set(keys())


def test_exported_lines_come_back_the_same(tmp_path):
    cache = Cache(tmp_path / "a.sqlite")
    cache.put([row("a", "ünï\n"), row("b", finish="refused")]).result()
    cache.put_finding("openai:m", "completions", {"answered": "m"}).result()
    lines = list(cache.export_lines())
    other = Cache(tmp_path / "b.sqlite")
    assert other.import_lines(lines) == 2
    assert list(other.export_lines()) == lines
    assert other.get_finding("openai:m") == {"answered": "m"}
    assert other.get_finding("openai:m", "prefill") is None
    with pytest.raises(ValueError, match=r"input, line 2: not a line of a teacher cache"):
        other.import_lines([lines[1].replace('"a"', '"z"'), '{"key": 1}'])
    assert "z" in other.get(["z"])
    cache.close()
    other.close()


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "c.sqlite"
    path.write_text("not a database, but long enough to look like something" * 100)
    with pytest.raises(OSError, match=r"c.sqlite cannot be opened as a teacher cache"):
        Cache(path)


def test_answers_are_kept_across_runs_and_replayed_without_a_key(make, server, ask, monkeypatch):
    teacher = make()
    requests = [ask(prefix=f" {i}", seed=i) for i in range(4)]
    first = teacher.continue_texts(requests)
    teacher.close()
    calls = len(server.log)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name)
    replay = make(replay_only=True)
    again = replay.continue_texts(requests)
    assert [result.continuations for result in again] == [result.continuations for result in first]
    assert all(result.num_cached == 3 and result.usage.calls == 0 for result in again)
    with pytest.raises(TeacherStopped, match=r"1 of 4 continuations are not in the cache"):
        replay.continue_texts([ask(prefix=" 0", seed=0), ask(prefix=" new", n=1)])
    assert len(server.log) == calls


def test_replay_of_an_empty_cache_is_an_error(make):
    with pytest.raises(TeacherStopped, match="the cache holds no answers of openai:m"):
        make(replay_only=True)


def test_without_a_cache_everything_is_asked_again(make, server, ask, tmp_path):
    teacher = make(cache_path="off")
    teacher.continue_texts([ask()])
    teacher.continue_texts([ask()])
    assert len(server.calls) == 2
    assert not list(tmp_path.glob("*.sqlite"))


def test_the_command_counts_exports_and_imports(tmp_path, capsys):
    from experiments import cache as command

    cache = Cache(tmp_path / "a.sqlite")
    cache.put([row("a"), row("b", finish="refused")]).result()
    cache.close()
    flags.FLAGS.mark_as_parsed()  # other mains, imported by other tests, have required flags of their own
    lines = tmp_path / "lines.jsonl"
    with flagsaver.flagsaver(cache=f"{tmp_path}/a.sqlite", export=str(lines)):
        command.main()
    assert len([json.loads(line) for line in lines.read_text().splitlines()]) == 2
    with flagsaver.flagsaver(**{"cache": f"{tmp_path}/b.sqlite", "import": str(lines)}):
        command.main()
    assert "2 samples read" in capsys.readouterr().out
    with flagsaver.flagsaver(cache=f"{tmp_path}/b.sqlite"):
        command.main()
    shown = capsys.readouterr().out
    assert "openai:m" in shown
    assert "refused" in shown


def test_the_command_names_a_file_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "experiments.cache", f"--cache={tmp_path}/none.sqlite"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "none.sqlite" in done.stderr
    assert "Traceback" not in done.stderr
