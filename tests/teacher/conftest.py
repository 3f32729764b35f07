"""The fault server and teachers that talk to it, with short waits."""

import dataclasses
import json

import pytest

from configs import base
from omniopd_jax.config import TeacherConfig
from omniopd_jax.teacher.budget import Budget, Caps
from omniopd_jax.teacher.factory import CALLS_FILE, make_teacher
from omniopd_jax.teacher.protocol import ContinuationRequest
from omniopd_jax.teacher.retry import RetryPolicy
from omniopd_jax.types import Message
from tests.teacher import fault_server

KEY = "sk-test-5c1d9be0f6a34c7788"
_MODELS = {"openai": "m", "anthropic": "claude-haiku-4-5", "gemini": "gemini-2.5-flash"}


@pytest.fixture
def faults():
    """The module of the fault server."""
    return fault_server


@pytest.fixture
def server():
    """A well-behaved server; set `server.behave` for faults."""
    with fault_server.FaultServer() as running:
        yield running


def config_of(kind: str, url: str, **changes) -> TeacherConfig:
    values = base.get_config().teacher.to_dict() | {
        "kind": kind,
        "base_url": f"{url}/v1" if kind == "openai" else url,
        "model": _MODELS[kind],
        "request_timeout_s": 5.0,
        "step_deadline_s": 30.0,
        "max_attempts": 5,
        "max_concurrency": 8,
    }
    return TeacherConfig(**(values | changes))


@pytest.fixture
def make(server, tmp_path, monkeypatch):
    """make(kind, **teacher settings) → a probed teacher that talks to `server`; closed at the end."""
    pytest.importorskip("openai")
    pytest.importorskip("anthropic")
    pytest.importorskip("google.genai")
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    teachers = []

    def build(kind="openai", *, is_raw=None, probed=True, workdir=tmp_path, base_s=0.01, cap_s=0.2, **changes):
        teacher = make_teacher(
            config_of(kind, server.url, **changes),
            workdir=workdir,
            run_seed=0,
            is_raw=kind == "openai" if is_raw is None else is_raw,
            policy=RetryPolicy(max_attempts=changes.get("max_attempts", 5), base_s=base_s, cap_s=cap_s),
        )
        teachers.append(teacher)
        if probed:
            teacher.probe()
        return teacher

    yield build
    for teacher in teachers:
        teacher.close()


@pytest.fixture
def spent(tmp_path):
    """spent() → what the work directory's run has cost, as a resumed run reads it from the ledger."""
    return lambda: Budget(None, Caps(), ledger=tmp_path / CALLS_FILE).spent


@pytest.fixture
def failures(tmp_path):
    """failures() → why attempts failed, one reason each, as the ledger has it."""

    def read():
        lines = (tmp_path / CALLS_FILE).read_text().splitlines()
        return [status for status in (json.loads(line)["status"] for line in lines) if status != "ok"]

    return read


@pytest.fixture
def ask():
    """ask(...) → a request, raw by default for the completions route."""

    def build(prompt="2 + 2", prefix=" = ", *, n=3, seed=1, is_raw=True, **changes):
        request = ContinuationRequest((Message("user", prompt),), prefix, n, 8, 1.0, 1.0, seed, is_raw)
        return dataclasses.replace(request, **changes)

    return build
