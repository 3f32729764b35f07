"""The launchers, run against stand-ins for gcloud, xpk, srun and sky that write down what they are asked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "experiments" / "launch"
CONFIG = "configs/qwen3_1p7b_math.py"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.fixture
def stubs(tmp_path):
    """A folder of executables on PATH; each appends its arguments, quoted, to calls.txt."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name: str, body: str = "exit 0") -> None:
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name}$(printf " %q" "$@")" >> {tmp_path}/calls.txt\n{body}\n')
        path.chmod(0o755)

    def run(script: str, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path), "PAUSE": "0"} | variables
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        calls = tmp_path / "calls.txt"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return add, run


TPU = dict(
    TPU="slice",
    ZONE="us-west4-a",
    ACCELERATOR="v5litepod-64",
    BUCKET="gs://b/runs",
    REPOSITORY="https://host/omniopd.git",
)


def test_a_tpu_slice_is_made_installed_and_trained_on(stubs):
    add, run = stubs
    add("gcloud", 'case "$*" in *describe*) test -e "$HOME/made" && echo READY ;; *create*) touch "$HOME/made" ;; esac')
    done, calls = run("tpu_vm.sh", CONFIG, "--config.data.system_prompt=Think, then answer.", **TPU)
    assert done.returncode == 0, done.stderr
    assert "done: gs://b/runs/qwen3_1p7b_math" in done.stdout
    asked = [call for call in calls if "describe" not in call]
    assert "tpu-vm create slice --zone us-west4-a --accelerator-type v5litepod-64" in asked[0]
    assert asked[0].endswith("--spot")
    assert "ssh slice --zone us-west4-a --worker=all --command" in asked[1]
    train = asked[-1].replace("\\", "")
    assert "python3 -m experiments.train --config=configs/qwen3_1p7b_math.py" in train
    assert "--workdir=gs://b/runs/qwen3_1p7b_math" in train
    assert "Think, then answer." in train, "arguments arrive as they were given"


def test_a_preempted_slice_is_made_anew_and_the_run_resumes(stubs):
    """First the slice is taken while it trains, then it is gone, then all goes well."""
    add, run = stubs
    add(
        "gcloud",
        """case "$*" in
  *describe*) cat "$HOME/state" 2>/dev/null || exit 1 ;;
  *create*) echo READY > "$HOME/state" ;;
  *delete*) rm "$HOME/state" ;;
  *experiments.train*) test -e "$HOME/taken" || { touch "$HOME/taken"; echo PREEMPTED > "$HOME/state"; exit 255; } ;;
esac""",
    )
    done, calls = run("tpu_vm.sh", CONFIG, **TPU)
    assert done.returncode == 0, done.stderr
    assert "the run resumes from gs://b/runs/qwen3_1p7b_math" in done.stderr
    words = [
        next(word for word in ("create", "delete", "train", "install", "describe") if word in call) for call in calls
    ]
    assert [word for word in words if word not in ("describe", "install")] == [
        "create",
        "train",
        "delete",
        "create",
        "train",
    ]


def test_bad_input_is_not_tried_again(stubs):
    add, run = stubs
    add("gcloud", 'case "$*" in *describe*) echo READY ;; *experiments.train*) exit 2 ;; esac')
    done, calls = run("tpu_vm.sh", CONFIG, **TPU)
    assert done.returncode == 2
    assert sum("experiments.train" in call for call in calls) == 1


def test_xpk_makes_one_workload(stubs):
    add, run = stubs
    add("xpk")
    done, calls = run(
        "xpk.sh", CONFIG, "--config.train.steps=3", CLUSTER="c", TPU_TYPE="v5litepod-64", IMAGE="i", BUCKET="gs://b"
    )
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call.startswith("xpk workload create --cluster c --workload qwen3-1p7b-math --tpu-type v5litepod-64")
    assert "--config.train.steps=3" in call
    assert "--env-file" not in call


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (143, True)])
def test_a_slurm_job_that_was_stopped_goes_back_into_the_queue(stubs, status, requeued):
    add, run = stubs
    add("srun", f"exit {status}")
    add("scontrol")
    done, calls = run("slurm.sh", CONFIG, "--config.train.steps=3", SLURM_JOB_ID="7", WORKDIR="/shared/run")
    assert done.returncode == status
    assert calls[0] == (
        "srun --kill-on-bad-exit=1 python -m experiments.train --config=configs/qwen3_1p7b_math.py "
        "--workdir=/shared/run --config.train.steps=3"
    )
    assert (calls[1:] == ["scontrol requeue 7"]) == requeued


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_a_launcher_without_a_config_says_so(stubs, script):
    _, run = stubs
    done, calls = run(script)
    assert done.returncode == 1
    assert "name a config file" in done.stderr
    assert not calls


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_launchers_are_linted(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    linter = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([linter, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_sky_task_runs_the_config_that_it_is_given(tmp_path):
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert set(task) <= {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | task["envs"]
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "WORKDIR names a folder in a bucket" in done.stderr
    environment |= {"WORKDIR": "gs://b/run", "FLAGS": "--config.train.steps=3"}
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [
        "-m", "experiments.train", f"--config={task['envs']['CONFIG']}", "--workdir=gs://b/run",
        "--config.train.steps=3",
    ]  # fmt: skip
