"""The commands that users type, on real folders and real rows, each in a process of its own."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

from configs import gsm8k
from omniopd_jax import config, models
from omniopd_jax.data import load_tokenizer
from omniopd_jax.train import small_world
from omniopd_jax.types import Anchors
from tests.tiny_tokenizers import save_byte_level

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("OMNIOPD_DATA", ROOT.parent / "shared" / "data"))
GSM8K = DATA / "gsm8k" / "train.jsonl"


def command(*arguments: object, devices: int = 1, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=_environment() | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True,
        text=True,
        **options,
    )


def _environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tiny")
    done = command("experiments.train", "--config=configs/tiny.py", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir, done


def test_tiny_needs_nothing_and_leaves_a_whole_work_directory(tiny):
    workdir, done = tiny
    assert "updates  8" in done.stdout
    assert [row["step"] for row in _lines(workdir / "metrics.jsonl")] == list(range(1, 9))
    audits = _lines(workdir / "audits.jsonl")
    assert {row["step"] for row in audits} == set(range(1, 9))
    for audit in audits:
        assert audit["count"] == len(audit["continuations"]) == audit["requested"] == 2
        k, n, prior = audit["score_sum"], audit["count"], audit["prior"]
        assert audit["target"] == pytest.approx((k + prior) / (n + 1), abs=2e-4)  # α = 1
    assert "<html" in (workdir / "report.html").read_text(encoding="utf-8")
    assert not [line for line in done.stderr.splitlines() if "Traceback" in line or "tensorflow" in line.lower()]


def test_transformers_opens_the_exported_student(tiny):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    workdir, _ = tiny
    theirs = transformers.AutoModelForCausalLM.from_pretrained(workdir / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "model")
    ids = np.asarray([tokenizer("1 + 2 = add 1 and 2")["input_ids"]], np.int32)
    ours = models.logits(models.load_model(workdir / "model"), ids, np.ones_like(ids, bool))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4)


def test_running_again_says_done_and_changes_nothing(tiny):
    workdir, _ = tiny
    before = (workdir / "metrics.jsonl").read_bytes(), (workdir / "model" / "model.safetensors").read_bytes()
    done = command("experiments.train", "--config=configs/tiny.py", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "updates  8" in done.stdout
    assert ((workdir / "metrics.jsonl").read_bytes(), (workdir / "model" / "model.safetensors").read_bytes()) == before


def test_a_work_directory_of_another_config_is_refused(tiny):
    workdir, _ = tiny
    done = command(
        "experiments.train", "--config=configs/tiny.py", f"--workdir={workdir}", "--config.audit.num_chunks=1"
    )
    assert done.returncode == 2
    assert "audit.num_chunks" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_judges_the_exported_student(tiny, tmp_path):
    workdir, _ = tiny
    out = tmp_path / "answers.jsonl"
    done = command(
        "experiments.evaluate", f"--model={workdir}", "--task=world", f"--data={workdir / 'world' / 'eval.jsonl'}",
        "--max_new_tokens=24", "--samples=2", "--temperature=1", f"--output={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = _lines(out)
    assert len(rows) == 80
    accuracy = 100 * np.mean([row["is_correct"] for row in rows])
    assert f"accuracy   {accuracy:.1f} ±" in done.stdout


def test_audit_shows_one_prompt_and_trains_nothing(tiny):
    workdir, _ = tiny
    done = command(
        "experiments.audit", "--config=configs/tiny.py", f"--config.world.path={workdir / 'world'}", "--prompt=3 + 4",
        devices=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("3 + 4", "entropy", "teacher", "prior", "target"):
        assert word in done.stdout, done.stdout


def test_ctrl_c_checkpoints_and_the_same_command_goes_on(tmp_path, tiny):
    world = tiny[0] / "world"
    arguments = [
        sys.executable, "-m", "experiments.train", "--config=configs/tiny.py", f"--workdir={tmp_path}",
        f"--config.world.path={world}", "--config.train.steps=400", "--config.train.checkpoint_every=1000",
    ]  # fmt: skip
    process = subprocess.Popen(arguments, cwd=ROOT, env=_environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.time() + 300
    while time.time() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr[-2000:]
    assert "checkpoint" in stderr
    finished = len(_lines(metrics))
    assert finished < 400
    done = command(*arguments[2:], f"--config.train.steps={finished + 2}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["step"] for row in _lines(metrics)] == list(range(1, finished + 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student and a teacher in Qwen3 layout with random weights and a byte-level tokenizer with a chat template."""
    root = tmp_path_factory.mktemp("folders")
    for name, width in (("student", 32), ("teacher", 64)):
        save_byte_level(root / name)
        tokenizer = load_tokenizer(root / name)
        values = json.loads(small_world.model_config(width, 2, vocab_size=tokenizer.vocab_size).source) | dict(
            vocab_size=tokenizer.vocab_size + 24, eos_token_id=tokenizer.stop_tokens[0], pad_token_id=tokenizer.pad_id,
            max_position_embeddings=2048,
        )  # fmt: skip
        model = models.init_model(models.decoder_config(values), jax.random.key(width))
        models.save_model(root / name, model, tokenizer.hf)
    return root


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no GSM8K rows at {GSM8K}; OMNIOPD_DATA names the folder")
def test_gsm8k_with_any_two_folders_trains_resumes_exports_and_evaluates(folders, tmp_path):
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)[:64]), encoding="utf-8")
    arguments = [
        "experiments.train", "--config=configs/gsm8k.py", f"--workdir={tmp_path / 'run'}",
        f"--config.student.path={folders / 'student'}", f"--config.teacher.path={folders / 'teacher'}",
        f"--config.data.train={rows}", "--config.data.max_prompt_tokens=768", "--config.rollout.batch_size=4",
        "--config.rollout.max_new_tokens=48", "--config.audit.chunk_tokens=8", "--config.audit.num_chunks=2",
        "--config.audit.num_continuations=2", "--config.train.micro_batch_size=2",
    ]  # fmt: skip
    first = command(*arguments, "--config.train.steps=2")
    assert first.returncode == 0, first.stderr[-2000:]
    second = command(*arguments, "--config.train.steps=3")
    assert second.returncode == 0, second.stderr[-2000:]
    assert [row["step"] for row in _lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    audit = _lines(tmp_path / "run" / "audits.jsonl")[0]
    assert audit["prompt_id"].startswith("train:")
    measured = command(
        "experiments.evaluate", f"--model={tmp_path / 'run'}", "--task=math", f"--data={rows}", "--problems=4",
        "--max_new_tokens=16",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr[-2000:]
    assert "(4 problems, 1 samples each)" in measured.stdout


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"config.student.path": "{absent}"}, "absent"),
        ({"config.teacher.path": "{absent}"}, "absent"),
        ({"config.data.train": "{absent}.jsonl"}, "No prompt file"),
        ({"config.student.path": "{empty}"}, "empty"),
        ({"config.student.path": "{unknown}"}, "'BertModel'"),
        ({"config.student.path": "{partial}"}, "lacks 1 tensors"),
        ({"config.mesh.fsdp": 3}, "mesh"),
        ({"config.audit.num_chunkz": 3}, "num_chunks"),
        ({"config.audit.similarity": "rouge7"}, "rouge7"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(folders, tmp_path, overrides, sentence):
    paths = {name: tmp_path / name for name in ("absent", "empty", "unknown", "partial")}
    paths["empty"].mkdir()
    for name in ("unknown", "partial"):
        shutil.copytree(folders / "student", paths[name])
    (paths["unknown"] / "config.json").write_text('{"architectures": ["BertModel"]}')
    tensors = load_file(paths["partial"] / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, paths["partial"] / "model.safetensors")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n', encoding="utf-8")
    settings = {
        "config.student.path": str(folders / "student"),
        "config.teacher.path": str(folders / "teacher"),
        "config.data.train": str(rows),
    } | {
        name: str(value).format(**paths)
        for name, value in overrides.items()
    }  # fmt: skip
    done = command(
        "experiments.train", "--config=configs/gsm8k.py", f"--workdir={tmp_path / 'run'}",
        *(f"--{name}={value}" for name, value in settings.items()),
    )  # fmt: skip
    assert done.returncode == 2, (done.stdout + done.stderr)[-2000:]
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def _main(name: str):
    """A main's module without its flags, for two mains have flags of one name."""
    module = importlib.import_module(f"experiments.{name}")
    for flag in list(flags.FLAGS.flags_by_module_dict().get(module.__name__, ())):
        if flag.name in flags.FLAGS:
            delattr(flags.FLAGS, flag.name)
    return module


AUDIT, EVALUATE = _main("audit"), _main("evaluate")


def test_a_work_directory_is_measured_on_prompts_as_it_was_trained(tmp_path):
    assert EVALUATE.layout(tmp_path, {}).template_args == {"enable_thinking": False}
    values = gsm8k.get_config().to_dict()
    values["data"]["template_args"] = {"enable_thinking": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert EVALUATE.layout(tmp_path, {}).system_prompt == "", "a model folder's own config.json is another"
    (tmp_path / "model").mkdir()
    found = EVALUATE.layout(tmp_path, {"system_prompt": None})
    assert found.system_prompt == values["data"]["system_prompt"] != ""
    assert found.template_args == {"enable_thinking": True}
    found = EVALUATE.layout(tmp_path, {"system_prompt": "", "use_chat_template": False})
    assert (found.system_prompt, found.use_chat_template) == ("", False)


def test_evaluate_opens_its_output_before_it_generates(tiny, tmp_path):
    workdir, _ = tiny
    done = command(
        "experiments.evaluate", f"--model={workdir}", f"--data={workdir / 'world' / 'eval.jsonl'}",
        f"--output={tmp_path / 'absent' / 'answers.jsonl'}",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "answers.jsonl cannot be written: No such file" in done.stderr
    assert "answers  " not in done.stderr, "the bar of answers begun"


def test_an_audit_keeps_what_was_paid_for_and_nothing_else(tmp_path):
    teacher = config.from_mapping(gsm8k.get_config()).teacher
    assert AUDIT.with_kept_cache(teacher, str(tmp_path / "a")) == teacher
    assert not (tmp_path / "a").exists(), "a local teacher has no cache"
    paid = dataclasses.replace(teacher, kind="openai")
    assert AUDIT.with_kept_cache(paid, str(tmp_path / "a")).cache_path == str(tmp_path / "a" / "teacher_cache.sqlite")
    assert (tmp_path / "a").is_dir()
    off = dataclasses.replace(paid, cache_path="off")
    assert AUDIT.with_kept_cache(off, str(tmp_path / "b")) == off


def test_an_audit_asks_about_the_first_response_alone():
    anchors = Anchors(start_BxM=np.zeros((3, 2), np.int32), is_valid_BxM=np.array([[True, False]] * 3))
    assert AUDIT.first_alone(anchors).is_valid_BxM.tolist() == [[True, False], [False, False], [False, False]]
