"""A run that is killed at any moment and run again is the run in one go: parameters, metrics, texts and what is spent.

python tests/train/kill_test.py FOLDER NAME      one run, with a server of its own that answers by the question
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
# What a step paid depends on what an earlier attempt had paid already; everything else is a function of the step.
PAID = ("teacher/calls", "teacher/prompt_tokens", "teacher/completion_tokens", "teacher/tokens", "teacher/dollars",
        "teacher/cached", "teacher/total_dollars")  # fmt: skip


def start(folder: Path, name: str) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    log = (folder / f"{name}.log").open("a")
    return subprocess.Popen(
        [sys.executable, str(Path(__file__)), str(folder), name], env=environment, cwd=ROOT, stdout=log, stderr=log
    )


def lines(workdir: Path, name: str) -> list[dict]:
    path = workdir / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def is_same_every_time(name: str) -> bool:
    return not name.startswith(("time/", "compile/")) and "seconds" not in name and name not in PAID


@pytest.mark.slow
def test_killed_and_run_again_is_the_run_in_one_go(tmp_path):
    pytest.importorskip("openai")
    whole = start(tmp_path, "whole")
    assert whole.wait(900) == 0, (tmp_path / "whole.log").read_text()[-3000:]

    seed = random.SystemRandom().randrange(10**6)
    moment = random.Random(seed)
    killed = start(tmp_path, "killed")
    after, finished = moment.randrange(1, STEPS - 2), 0
    while finished < after and killed.poll() is None:
        metrics = tmp_path / "killed" / "metrics.jsonl"
        finished = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        time.sleep(0.002)
    time.sleep(moment.random() * 0.1)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (tmp_path / "killed.log").read_text()[-3000:]
    again = start(tmp_path, "killed")
    assert again.wait(900) == 0, (tmp_path / "killed.log").read_text()[-3000:]

    where = f"seed {seed}, killed after step {finished}"
    model = "model/model.safetensors"
    assert (tmp_path / "killed" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes(), where
    for name in ("audits", "rollouts"):
        assert lines(tmp_path / "killed", name) == lines(tmp_path / "whole", name), where
    ours, theirs = lines(tmp_path / "killed", "metrics"), lines(tmp_path / "whole", "metrics")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        kept = [{name: value for name, value in line.items() if is_same_every_time(name)} for line in (mine, other)]
        assert kept[0] == kept[1], where
    assert ours[-1]["teacher/total_tokens"] > 0
    # Money is what was paid: each start of a run pays for a probe of the teacher, and no answer is paid for twice.
    paid, paid_in_one_go = (found[-1]["teacher/total_dollars"] for found in (ours, theirs))
    assert 0 < paid_in_one_go <= paid <= 1.02 * paid_in_one_go, where


def main(folder: Path, name: str) -> None:
    import numpy as np

    from omniopd_jax.data import load_tokenizer
    from omniopd_jax.train import loop
    from omniopd_jax.types import Message, Prompt
    from omniopd_jax.worlds import arithmetic
    from tests.teacher.fault_server import Answer, FaultServer
    from tests.train.conftest import tiny_config, tiny_model

    arithmetic.save_tokenizer(str(folder / f"{name}.tokenizer"))
    tokenizer = load_tokenizer(folder / f"{name}.tokenizer")
    prices = folder / "prices.json"
    entry = {"model": "m", "input": 1.0, "output": 3.0, "date": "2026-01-01"}
    prices.write_text(json.dumps({"prices": [entry]}), encoding="utf-8")

    def behave(call):
        if call.is_probe:
            return Answer()
        content = json.dumps([call.body.get("prompt"), call.body.get("seed")]).encode()
        first = hashlib.sha256(content).digest()[0]
        texts = [f" add {(first + i) % 10} and {(first * 7 + i) % 10} with 0 gives" for i in range(call.n)]
        return Answer(texts=texts, delay_s=0.01)

    problems = arithmetic.problems(np.random.default_rng(0), 30, 1)
    prompts = [Prompt(f"p{i}", (Message("user", problem.question),), is_raw=True) for i, problem in enumerate(problems)]
    with FaultServer(behave) as server:
        config = tiny_config(
            **{
                "train.steps": STEPS,
                "train.compilation_cache": str(folder / "compiled"),
                "data.use_chat_template": False,
                "teacher.kind": "openai",
                "teacher.model": "m",
                "teacher.base_url": f"{server.url}/v1",
                "teacher.prices": str(prices),
            }
        )
        loop.run(
            config,
            folder / name,
            student=tiny_model(tokenizer.vocab_size),
            tokenizer=tokenizer,
            prompts=prompts,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
