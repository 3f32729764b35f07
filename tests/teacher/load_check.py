"""How many calls a second the client sustains: 64 responses × 10 chunks × 10 samples against a server that answers at
once, in a process of its own.

    python -m tests.teacher.load_check [--responses=64] [--kind=openai,anthropic,gemini]

Prints calls a second, the client's processor milliseconds a call and its share of one core; the same with the cache
switched off, and for the SDK and its HTTP library alone. On a machine that does other work besides, only the processor
time means something.
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

from omniopd_jax.teacher.anthropic import AnthropicDialect
from omniopd_jax.teacher.dialect import Manner
from omniopd_jax.teacher.factory import make_teacher
from omniopd_jax.teacher.gemini import GeminiDialect
from omniopd_jax.teacher.openai import OpenAIDialect
from omniopd_jax.teacher.protocol import ContinuationRequest
from omniopd_jax.types import Message
from tests.teacher.conftest import config_of

_DIALECTS = {"openai": OpenAIDialect, "anthropic": AnthropicDialect, "gemini": GeminiDialect}
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
    return line(f"{kind:10} n={max_n:<3} cache {'on ' if cache else 'off'}", calls, samples, seconds, processor)


def measure_sdk(kind: str, url: str, num_calls: int) -> str:
    """The dialect alone, 32 calls at a time: no retries, limits, ledger or cache."""
    config = config_of(kind, url)
    dialect = _DIALECTS[kind](
        config.model, base_url=config.base_url, api_key="sk-load-check-0123456789", timeout_s=60.0, max_connections=32
    )
    modes = {"openai": "completions", "anthropic": "prefill", "gemini": "prefill"}
    manner = Manner(modes[kind], max_n=1, seed=False, sampling="one")
    request = ContinuationRequest(
        (Message("user", "Task: add two numbers."),), "a word " * 200, 1, CHUNK_TOKENS, 1.0, 1.0, 0, kind == "openai"
    )
    body = dialect.body(request, manner)

    async def run() -> tuple[float, float]:
        await dialect.call(body, n=1, seed=None)
        left = iter(range(num_calls))
        start, processor = time.perf_counter(), time.process_time()

        async def work() -> None:
            for _ in left:
                await dialect.call(body, n=1, seed=None)

        await asyncio.gather(*(work() for _ in range(32)))
        spent = time.perf_counter() - start, time.process_time() - processor
        await dialect.close()
        return spent

    seconds, processor = asyncio.run(run())
    return line(f"{kind:10} SDK alone      ", num_calls, num_calls, seconds, processor)


def line(name: str, calls: int, samples: int, seconds: float, processor: float) -> str:
    return (
        f"{name} {calls:6} calls {seconds:6.1f} s {calls / seconds:7.0f} calls/s {samples / seconds:7.0f} samples/s "
        f"{1e3 * processor / calls:6.2f} ms CPU a call {100 * processor / seconds:4.0f} % of a core"
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
            print(measure_sdk(kind, url, options.responses * NUM_CHUNKS * NUM_SAMPLES), flush=True)
            for max_n, cache in ((1, True), (1, False)) + (((10, True),) if kind == "openai" else ()):
                print(measure(kind, url, options.responses, max_n=max_n, cache=cache), flush=True)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
