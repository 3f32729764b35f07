"""A planted key is nowhere but in the request's own headers."""

import logging

import pytest

from omniopd_jax.config import ConfigError
from omniopd_jax.teacher.protocol import TeacherStopped
from omniopd_jax.teacher.redaction import MARK, Redactor, key_from_environment
from tests.teacher.conftest import KEY

KINDS = ("openai", "anthropic", "gemini")


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_key_is_sent_and_found_nowhere(kind, make, server, ask, faults, tmp_path, caplog, capfd):
    """The server repeats the key in texts, errors and its own name; nothing that we write or raise repeats it."""
    caplog.set_level(logging.DEBUG)
    texts = []
    teacher = make(kind)
    assert any(KEY in value for value in server.log[0]["call"].headers.values())
    server.behave = lambda call: faults.Answer(texts=[f" {KEY} {i}" for i in range(call.n)])
    results = teacher.continue_texts([ask(n=2, is_raw=kind == "openai")])
    texts += [found.text for found in results[0].continuations]
    server.behave = lambda call: faults.Answer(status=500, body={"error": {"message": f"key {KEY} is busy"}})
    with pytest.raises(TeacherStopped) as busy:
        teacher.continue_texts([ask(prefix=" x", n=1, is_raw=kind == "openai")])
    server.behave = lambda call: faults.Answer(status=401, body={"error": {"message": f"wrong key {KEY}"}})
    with pytest.raises(TeacherStopped) as refused:
        teacher.continue_texts([ask(prefix=" y", n=1, is_raw=kind == "openai")])
    with pytest.raises(TeacherStopped) as unproved:
        teacher.probe()
    server.behave = lambda call: faults.Answer(model=f"{KEY}-large")
    with pytest.raises(TeacherStopped) as renamed:
        teacher.continue_texts([ask(prefix=" z", n=1, is_raw=kind == "openai")])
    teacher.close()
    for stopped in (busy, refused, unproved, renamed):
        texts += [f"{error!r} {error} {vars(error)}" for error in chain(stopped.value)]
        assert MARK in str(stopped.value)
    texts += [caplog.text, *capfd.readouterr(), repr(vars(teacher._config))]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"teacher_cache.sqlite", "teacher_probe.json", "teacher_calls.jsonl"} <= {path.name for path in files}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    for text in texts:
        assert KEY not in text


def test_longer_secrets_go_first():
    redact = Redactor(["secret-0123456789", "secret-0123456789-and-more"], environment={})
    assert redact("a secret-0123456789-and-more b secret-0123456789") == f"a {MARK} b {MARK}"
    assert Redactor(["", "x" * 12], environment={})("plain") == "plain"


def test_other_keys_of_the_environment_are_kept_out_too():
    redact = Redactor([], environment={"OTHER_API_KEY": "abcdefghijklmnop", "HOME": "/home/somebody-long"})
    assert redact("abcdefghijklmnop /home/somebody-long") == f"{MARK} /home/somebody-long"


def test_key_names():
    environment = {"MINE": "k1", "OPENAI_API_KEY": "k2"}
    assert key_from_environment("MINE", ("OPENAI_API_KEY",), environment) == "k1"
    assert key_from_environment("", ("OPENAI_API_KEY",), environment) == "k2"
    assert key_from_environment("", ("OTHER",), environment) == ""
    assert key_from_environment("A", (), {"A": " k \n"}) == "k"
    with pytest.raises(ConfigError, match="holds no key") as told:
        key_from_environment("A", (), {"A": "sk-…-0123456789"})
    assert "0123456789" not in str(told.value)
    with pytest.raises(ConfigError, match="names THEIRS, which is not set"):
        key_from_environment("THEIRS", (), environment)
    with pytest.raises(ConfigError, match="not the key itself") as told:
        key_from_environment(KEY, (), environment)
    assert KEY not in str(told.value)
