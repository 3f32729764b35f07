"""A run that is killed in the middle of a step pays for nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omniopd_jax.teacher.cache import Cache
from tests.teacher.conftest import config_of

ROOT = Path(__file__).resolve().parents[2]
HELD_AFTER = 21  # one call of the probe and 20 answers; later ones never come

RUN = """
import json, sys
from pathlib import Path
from omniopd_jax.config import TeacherConfig
from omniopd_jax.teacher.factory import make_teacher
from omniopd_jax.teacher.protocol import ContinuationRequest
from omniopd_jax.types import Message
workdir, config = Path(sys.argv[1]), TeacherConfig(**json.loads(sys.argv[2]))
teacher = make_teacher(config, workdir=workdir, run_seed=0, is_raw=True)
teacher.probe()
requests = [ContinuationRequest((Message("user", f"task {i}"),), " so", 2, 8, 1.0, 1.0, i, True) for i in range(60)]
results = teacher.continue_texts(requests)
print(sum(len(result.continuations) for result in results), sum(result.num_cached for result in results))
teacher.close()
"""


def start_server(log, hold_after):
    command = [sys.executable, str(Path(__file__).with_name("fault_server.py")), f"--log={log}",
               f"--hold-after={hold_after}"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return server, int(server.stdout.readline())


def wait_for(condition, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.05)


def test_no_request_whose_answer_had_arrived_is_sent_twice(tmp_path):
    pytest.importorskip("openai")
    cache_path, log = tmp_path / "run" / "teacher_cache.sqlite", tmp_path / "server.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def command(port):
        config = config_of("openai", f"http://127.0.0.1:{port}", max_concurrency=8, request_timeout_s=60.0)
        return [sys.executable, "-c", RUN, str(tmp_path / "run"), json.dumps(vars(config))]

    def kept():
        if not cache_path.exists():
            return 0
        cache = Cache(cache_path)
        try:
            return sum(entry["samples"] for entry in cache.stats())
        finally:
            cache.close()

    server, port = start_server(log, HELD_AFTER)
    run = subprocess.Popen(command(port), env=environment)
    try:
        wait_for(lambda: kept() == 2 * (HELD_AFTER - 1))
        os.kill(run.pid, signal.SIGKILL)
    finally:
        run.kill()
        run.wait()
        server.kill()
        server.wait()
    answered = [json.loads(line)["body"]["prompt"] for line in log.read_text().splitlines()]
    assert len(answered) == len(set(answered)) == HELD_AFTER
    log.unlink()

    server, port = start_server(log, -1)
    try:
        done = subprocess.run(command(port), env=environment, capture_output=True, text=True, timeout=120)
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["120", str(2 * (HELD_AFTER - 1))]
    asked = [json.loads(line)["body"]["prompt"] for line in log.read_text().splitlines()]
    assert not set(asked) & set(answered)
    assert len(asked) == 1 + 60 - (HELD_AFTER - 1)
    calls = (tmp_path / "run" / "teacher_calls.jsonl").read_text().splitlines()
    assert len(calls) == HELD_AFTER + len(asked)
