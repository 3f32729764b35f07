"""A real server on this machine: `transformers serve` with a checkpoint made on the spot, asked over HTTP.

Slow: the server imports torch and serves, one call after the other, on the processor.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from configs import base
from omniopd_jax.config import from_mapping
from omniopd_jax.data.tokenizer import BROKEN
from omniopd_jax.teacher.factory import make_teacher
from omniopd_jax.teacher.local import load_teacher
from omniopd_jax.teacher.protocol import ContinuationRequest, TeacherStopped
from omniopd_jax.teacher.retry import RetryPolicy
from omniopd_jax.train import loop
from omniopd_jax.types import Message
from tests.teacher.conftest import config_of
from tests.tiny_tokenizers import save_byte_level

pytestmark = pytest.mark.slow


def save_model(folder: Path, *, do_sample: bool) -> Path:
    """A random Qwen3 whose texts vary, in HF layout with a tokenizer and a generation config."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_byte_level(folder)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=402, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.3, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(do_sample=do_sample, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def serving(folder: Path, log: Path):
    """`transformers serve` on a free port of loopback, ready to answer."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = shutil.which("transformers", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            end = time.monotonic() + 120.0
            while True:
                assert server.poll() is None, log.read_text()
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def teacher_of(url: str, folder: Path, workdir: Path, **changes):
    settings = {"model": str(folder), "path": str(folder), "request_timeout_s": 120.0, "step_deadline_s": 300.0}
    config = config_of("openai", url, **(settings | changes))
    return make_teacher(
        config, workdir=workdir, run_seed=0, template_args={"enable_thinking": False}, policy=RetryPolicy(base_s=0.1)
    )


def requests(**changes) -> list[ContinuationRequest]:
    values = {"n": 3, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0} | changes
    prefixes = ("", "12 + 34", "12 + 34 = 46, so")
    return [
        ContinuationRequest(messages=(Message("user", "12 + 34"),), prefix=prefix, seed=seed, **values)
        for seed, prefix in enumerate(prefixes)
    ]


def train_two_steps(url: str, folder: Path, tmp_path: Path) -> list[dict]:
    """Two optimizer steps of the whole pipeline; its metrics, one object a step."""
    prompts = [{"id": f"p{i}", "prompt": f"{i} + {i + 3}", "answer": str(2 * i + 3)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    values = base.get_config()
    values.student.path = str(folder)
    values.data.train = str(tmp_path / "train.jsonl")
    values.rollout.update(batch_size=4, max_new_tokens=16)
    values.audit.update(num_chunks=2, chunk_tokens=4, num_continuations=2)
    values.train.update(steps=2, compilation_cache="off")
    values.teacher.update(
        kind="openai", base_url=f"{url}/v1", model=str(folder), path=str(folder), request_timeout_s=120.0
    )
    loop.run(from_mapping(values), tmp_path / "trained")
    return [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]


def test_a_served_checkpoint_continues_prefixes_and_trains(tmp_path):
    folder = save_model(tmp_path / "sampling", do_sample=True)
    with serving(folder, tmp_path / "server.log") as url:
        teacher = teacher_of(url, folder, tmp_path / "run")
        said = teacher.probe()
        assert "mode completions, one sample a call" in said
        assert "Two samples differ." in said
        results = teacher.continue_texts(requests())
        for result in results:
            assert len(result.continuations) == 3
            assert result.usage.calls == 3
        texts = [found.text for result in results for found in result.continuations]
        assert len(set(texts)) > 3
        teacher.close()

        # The very same texts come back from the cache, with the server's answers unused.
        again = teacher_of("http://127.0.0.1:1", folder, tmp_path / "run", replay_only=True)
        assert [result.continuations for result in again.continue_texts(requests())] == [
            result.continuations for result in results
        ]
        again.close()

        # Without sampling, the served model and the same model as a local teacher write the same texts.
        greedy = teacher_of(url, folder, tmp_path / "greedy", temperature=0.0)
        greedy.probe()
        served = greedy.continue_texts(requests(n=1, temperature=0.0))
        greedy.close()

        trained = train_two_steps(url, folder, tmp_path)
        assert [line["step"] for line in trained] == [1, 2]
        for line in trained:
            assert line["teacher/received"] == line["teacher/requested"] == line["teacher/calls"] > 0
            assert np.isfinite(line["loss/total"])

        other = teacher_of(url, folder, tmp_path / "other", model="another")
        with pytest.raises(TeacherStopped):
            other.probe()
        other.close()

    local = load_teacher(folder, template_args={"enable_thinking": False})
    for ours, theirs in zip(local.continue_texts(requests(n=1, temperature=0.0)), served, strict=True):
        # The last token may end inside a character, which the local teacher leaves out.
        assert ours.continuations[0].text == theirs.continuations[0].text.rstrip(BROKEN)
    local.close()


def test_a_server_that_decodes_greedily_is_told_to_sample(tmp_path):
    folder = save_model(tmp_path / "greedy", do_sample=False)
    with serving(folder, tmp_path / "server.log") as url:
        teacher = teacher_of(url, folder, tmp_path / "run", cache_path="off")
        assert "told to sample" in teacher.probe()
        (result,) = teacher.continue_texts(requests(n=6)[:1])
        assert len({found.text for found in result.continuations}) > 2
        teacher.close()
        found = json.loads((tmp_path / "run" / "teacher_probe.json").read_text())
        assert json.loads(found["manner"]["extra"]["generation_config"])["do_sample"] is True
