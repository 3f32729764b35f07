"""Several processes are as good as one: real ones on loopback, with CPU collectives, against a run of one process.

python tests/multi_process_test.py FOLDER NAME [FAULT]      runs one process of a run
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2
FAULTY_STEP = 2  # in which the teacher of the last process fails, where it is asked to


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
    }


class Run:
    """The processes of one run, each with a log of its own."""

    def __init__(self, folder: Path, processes: int, name: str, fault: str = "", devices: int = 1):
        self.logs = [folder / f"{name}.{fault}{index}.log" for index in range(processes)]
        others = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(processes),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__)), str(folder), name, fault],
                env=environment(devices) | others | {"JAX_PROCESS_ID": str(index)},
                cwd=ROOT,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for index, log in enumerate(self.logs)
        ]

    def codes(self, within_s: float = 400.0) -> list[int]:
        """Exit codes; whoever has not ended in time is killed."""
        end = time.monotonic() + within_s
        for process in self.processes:
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return [process.returncode for process in self.processes]

    @property
    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in self.logs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def done(folder: Path, processes: int, name: str, **options) -> Path:
    run = Run(folder, processes, name, **options)
    assert run.codes() == [0] * processes, run.text
    return folder / name


@pytest.fixture(scope="module")
def one(folder):
    return done(folder, 1, "one")


@pytest.fixture(scope="module")
def two(folder, one):
    return done(folder, 2, "two")


def lines(workdir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_run(workdir: Path, reference: Path, *, rtol: float = 1e-5) -> None:
    """The same parameters, and the same account of every step."""
    start = load_file(reference.parent / "start" / "model.safetensors")
    found, expected = (load_file(path / "model" / "model.safetensors") for path in (workdir, reference))
    for name, value in expected.items():
        moved = np.abs(value - start[name]).max()
        assert moved > 1e-6, f"{name} did not move: the comparison would say nothing"
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol * moved, err_msg=name)
    for ours, theirs in zip(lines(workdir, "metrics"), lines(reference, "metrics"), strict=True):
        for name, value in theirs.items():
            if not name.startswith(("time/", "compile/")) and "seconds" not in name:
                assert ours[name] == pytest.approx(value, rel=2e-4, abs=1e-7), name
    texts = ("step", "response", "prompt_id", "slot", "start", "chunk", "continuations", "count")
    for ours, theirs in zip(lines(workdir, "audits"), lines(reference, "audits"), strict=True):
        assert [ours[name] for name in texts] == [theirs[name] for name in texts]
    assert [line["tokens"] for line in lines(workdir, "rollouts")] == [
        line["tokens"] for line in lines(reference, "rollouts")
    ]


def test_two_processes_learn_what_one_learns(one, two):
    assert_same_run(two, one)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())


@pytest.mark.slow
def test_one_process_s_teacher_stops_all_and_one_process_goes_on_from_their_checkpoint(folder, one, two):
    run = Run(folder, 2, "stopped", fault="teacher")
    assert run.codes() == [3, 3], run.text
    assert "TeacherStopped: The teacher is gone." in run.logs[1].read_text()
    assert "Process 1 stopped: TeacherStopped: The teacher is gone." in run.logs[0].read_text()
    assert [line["step"] for line in lines(folder / "stopped", "metrics")] == [FAULTY_STEP - 1]
    assert os.listdir(folder / "stopped" / "checkpoints") == [str(FAULTY_STEP - 1)]
    assert_same_run(done(folder, 1, "stopped"), one)


@pytest.mark.slow
def test_parts_learnt_one_by_one_on_two_processes(folder, one):
    whole = done(folder, 1, "whole", fault="apart")
    assert_same_run(done(folder, 2, "parts", fault="apart, in parts"), whole)
    run = Run(folder, 2, "parts_stopped", fault="apart, in parts, teacher")
    assert run.codes() == [3, 3], run.text
    assert os.listdir(folder / "parts_stopped" / "checkpoints") == [str(FAULTY_STEP - 1)]


@pytest.mark.slow
def test_four_processes_on_a_mesh_of_eight_devices(folder, one):
    assert_same_run(done(folder, 4, "four", fault="mesh", devices=2), one)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all(folder, one):
    run = Run(folder, 2, "signal", fault="endless")
    metrics = folder / "signal" / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text()):
        assert time.monotonic() < end, run.text
        time.sleep(0.1)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.codes(60) == [143, 143], run.text
    assert os.listdir(folder / "signal" / "checkpoints") == [str(len(lines(folder / "signal", "metrics")))]


@pytest.mark.slow
def test_a_bug_of_one_process_does_not_hang_the_other(folder, one):
    run = Run(folder, 2, "bug", fault="bug")
    assert run.codes() == [1, 1], run.text
    assert "Process 1 failed: KeyError: 'a bug'" in run.logs[0].read_text()


@pytest.mark.slow
def test_a_killed_process_ends_the_others(folder, one):
    run = Run(folder, 2, "killed", fault="endless")
    metrics = folder / "killed" / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text()):
        assert time.monotonic() < end, run.text
        time.sleep(0.1)
    run.processes[1].kill()
    codes = run.codes(180)
    assert codes[1] == -9, run.text
    assert codes[0] not in (0, -9), run.text


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (0, "Of the 2 processes of this run, 1 did not come to"),
        (1, "Process 1 of 2 did not reach process 0 at"),
    ],
)
def test_processes_that_do_not_meet_say_so_before_anything_is_computed(tmp_path, index, sentence):
    found = subprocess.run(
        [
            sys.executable, "-m", "experiments.train", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}",
            f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", f"--process_id={index}",
            "--coordinator_timeout_s=1",
        ],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    assert sentence in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()


def main(folder: Path, name: str, fault: str) -> None:
    from omniopd_jax.train import distributed

    distributed.start()

    import jax

    from omniopd_jax import models
    from omniopd_jax.data import load_tokenizer
    from omniopd_jax.teacher.protocol import Continuation, TeacherStopped
    from omniopd_jax.teacher.scripted import ScriptedTeacher
    from omniopd_jax.train import loop
    from omniopd_jax.worlds import arithmetic
    from tests.train.conftest import tiny_config, tiny_model

    is_last = jax.process_index() == jax.process_count() - 1
    tokens = folder / f"{name}.{fault}{jax.process_index()}.tokenizer"
    arithmetic.save_tokenizer(str(tokens))
    tokenizer = load_tokenizer(tokens)
    student = tiny_model(tokenizer.vocab_size)
    if name == "one":
        models.save_model(folder / "start", student, tokenizer.hf)
    finished, asked = [], []

    def answer(request):
        is_late = "parts" not in fault or asked.count(FAULTY_STEP - 1) == 2  # of a step in parts the second
        if is_last and len(finished) == FAULTY_STEP - 1 and ("teacher" in fault or fault == "bug") and is_late:
            raise KeyError("a bug") if fault == "bug" else TeacherStopped("The teacher is gone.")
        texts = ("add 1 and 2 with 0 gives", "7 plus 5 makes 1 2")
        return [Continuation(texts[(request.seed + i) % 2], "length") for i in range(request.n)]

    class Counted(ScriptedTeacher):
        def continue_texts(self, requests):
            asked.append(len(finished))
            return super().continue_texts(requests)

    # SGD in Adam's clothes: with b1 = b2 = 0 and a large eps a parameter changes by about its gradient.
    config = tiny_config(
        **{
            "train.steps": 10**6 if fault == "endless" else STEPS,
            "train.checkpoint_every": 0 if fault == "endless" else 3,
            "train.compilation_cache": str(folder / "compiled"),
            # one that needs other responses' verdicts, or one of a response's own, which lets parts be learnt apart
            "objective.baseline": "teacher_agreement" if "apart" in fault else "leave_one_out",
            "pipeline.micro_batches": 2 if "parts" in fault else 1,
            "rollout.samples_per_prompt": 2,
            "optimizer.warmup_steps": 0,
            "optimizer.learning_rate": 1.0,
            "optimizer.b1": 0.0,
            "optimizer.b2": 0.0,
            "optimizer.eps": 1.0,
            "optimizer.clip_norm": 0.0,
            **({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2} if fault == "mesh" else {}),
        }
    )
    problems = arithmetic.problems(np.random.default_rng(0), 30, 1)
    loop.run(
        config,
        folder / name,
        student=student,
        tokenizer=tokenizer,
        teacher=Counted(answer),
        prompts=[problem.prompt(f"p{i}") for i, problem in enumerate(problems)],
        progress=lambda step, metrics: finished.append(step),
    )


if __name__ == "__main__":
    from experiments.command import _guarded

    _guarded(lambda: main(Path(sys.argv[1]), *sys.argv[2:4]))
