"""How many calls a second the client sustains: 64 responses × 10 chunks × 10 samples against a server that answers at
once, in a process of its own.

    python -m tests.teacher.load_check [--responses=64] [--kind=openai,anthropic,gemini]

Prints one line a dialect: calls, seconds, calls a second, the client's processor seconds a call and its share of one
core. The same figures with the cache switched off show what durability costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from omniopd_jax.teacher.factory import make_teacher
from omniopd_jax.teacher.protocol import ContinuationRequest
from omniopd_jax.types import Message
from tests.teacher.conftest import config_of

NUM_CHUNKS, NUM_SAMPLES, CHUNK_TOKENS = 10, 10, 50
TEXT = " and so the sum of both is forty-five, which we write down before the tens are added to it"


class InstantServer(asyncio.Protocol):
    """Answers every request at once, with as many samples as it asks for."""

    count = 0

    def connection_made(self, transport):
        self.transport, self.buffer = transport, b""

    def data_received(self, data):
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            InstantServer.count += 1
            content = json.dumps(self.answer(head.split(b" ", 2)[1], body)).encode()
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                % (len(content), content)
            )

    def answer(self, path, body):
        text = f"{TEXT} {InstantServer.count}"
        if b"generatecontent" in path:
            return {
                "candidates": [{"content": {"parts": [{"text": text}]}, "finishReason": "MAX_TOKENS", "index": 0}],
                "modelVersion": "gemini-2.5-flash",
                "usageMetadata": {"promptTokenCount": 500, "candidatesTokenCount": CHUNK_TOKENS},
            }
        if b"messages" in path:
            return {
                "id": "m", "type": "message", "role": "assistant", "model": "claude-haiku-4-5",
                "content": [{"type": "text", "text": text}], "stop_reason": "max_tokens", "stop_sequence": None,
                "usage": {"input_tokens": 500, "output_tokens": CHUNK_TOKENS},
            }  # fmt: skip
        n = json.loads(body).get("n", 1)
        choices = [{"index": i, "text": f"{text} {i}", "finish_reason": "length"} for i in range(n)]
        usage = {"prompt_tokens": 500, "completion_tokens": n * CHUNK_TOKENS}
        return {"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": choices, "usage": usage}


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(InstantServer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def measure(kind: str, url: str, num_responses: int, *, max_n: int, cache: bool) -> str:
    """One step's worth of requests; the line to print."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "capabilities.json"
        modes = ["completions"] if kind == "openai" else ["prefill"]
        sampling = "one" if kind == "anthropic" else "both"
        record.write_text(
            json.dumps({"records": [{"kind": kind, "modes": modes, "max_n": max_n, "sampling": sampling}]})
        )
        config = config_of(
            kind, url, max_concurrency=32, capabilities=str(record), cache_path="" if cache else "off",
            step_deadline_s=600.0,
        )  # fmt: skip
        teacher = make_teacher(config, workdir=Path(folder), run_seed=0, is_raw=kind == "openai")
        teacher.probe()
        requests = [
            ContinuationRequest(
                (Message("user", f"Task {row}: add two numbers."),), "a word " * (40 * chunk + 20), NUM_SAMPLES,
                CHUNK_TOKENS, 1.0, 1.0, row * NUM_CHUNKS + chunk, kind == "openai",
            )
            for row in range(num_responses)
            for chunk in range(NUM_CHUNKS)
        ]  # fmt: skip
        start, processor = time.perf_counter(), time.process_time()
        results = teacher.continue_texts(requests)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        teacher.close()
    calls = sum(result.usage.calls for result in results)
    samples = sum(len(result.continuations) for result in results)
    assert samples == len(requests) * NUM_SAMPLES
    return (
        f"{kind:10} n={max_n:<3} cache {'on ' if cache else 'off'} {calls:6} calls {seconds:6.1f} s "
        f"{calls / seconds:7.0f} calls/s {samples / seconds:7.0f} samples/s "
        f"{1e3 * processor / calls:6.2f} ms CPU a call "
        f"{100 * processor / seconds:4.0f} % of a core"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--kind", default="openai,anthropic,gemini")
    parser.add_argument("--serve", action="store_true", help="be the server; prints its port")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    os.environ |= dict.fromkeys(("ANTHROPIC_API_KEY", "GEMINI_API_KEY"), "sk-load-check-0123456789")
    command = [sys.executable, "-m", "tests.teacher.load_check", "--serve"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        for kind in options.kind.split(","):
            for max_n, cache in ((1, True), (1, False)) + (((10, True),) if kind == "openai" else ()):
                print(measure(kind, url, options.responses, max_n=max_n, cache=cache), flush=True)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
