"""A server that speaks the dialects of OpenAI, Anthropic and Google as their SDKs expect, and misbehaves on demand.

In a test: `with FaultServer(behave) as server`, on a thread. In a process of its own:
`python tests/teacher/fault_server.py --port=0 --log=FILE --hold-after=N`, the port is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable
from typing import Any

WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron")


@dataclasses.dataclass
class Call:
    """One request as the server sees it."""

    number: int  # from 0, over the server's life
    dialect: str  # completions | chat | anthropic | gemini
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def is_probe(self) -> bool:
        return "picked at random" in json.dumps(self.body)

    @property
    def n(self) -> int:
        return self.body.get("n") or self.body.get("generationConfig", {}).get("candidateCount") or 1


@dataclasses.dataclass
class Answer:
    """What the server does. The default is a good answer."""

    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: Any = None  # None: a good answer in the call's dialect; bytes as they are; else JSON
    content_type: str = "application/json"
    texts: list[str] | None = None
    finish: str = "length"  # length | stop | refused
    model: str | None = None
    prompt_tokens: int = 7
    completion_tokens: int | None = None
    indices: list[int] | None = None
    delay_s: float = 0.0
    cut_after: int | None = None  # bytes of the body, then the connection is reset
    drip_s: float | None = None  # seconds between single bytes
    pad_bytes: int = 0  # white space before the body's end: a huge but legal body


_FINISH = {
    "openai": {"length": "length", "stop": "stop", "refused": "content_filter"},
    "anthropic": {"length": "max_tokens", "stop": "end_turn", "refused": "refusal"},
    "gemini": {"length": "MAX_TOKENS", "stop": "STOP", "refused": "SAFETY"},
}


def good_body(call: Call, answer: Answer) -> tuple[dict[str, Any], int]:
    """The JSON of a good answer and its completion tokens."""
    texts = answer.texts
    if texts is None:
        texts = [f" {WORDS[call.number % 8]} {WORDS[sample % 8]} {sample} {call.number}" for sample in range(call.n)]
    tokens = answer.completion_tokens if answer.completion_tokens is not None else 3 * len(texts)
    model = answer.model if answer.model is not None else call.body.get("model", "m")
    indices = answer.indices or list(range(len(texts)))
    pairs = list(zip(indices, texts, strict=True))
    if call.dialect == "anthropic":
        return {
            "id": "msg", "type": "message", "role": "assistant", "model": model,
            "content": [{"type": "text", "text": texts[0]}] if texts[0] else [],
            "stop_reason": _FINISH["anthropic"][answer.finish], "stop_sequence": None,
            "usage": {"input_tokens": answer.prompt_tokens, "output_tokens": tokens},
        }, tokens  # fmt: skip
    if call.dialect == "gemini":
        finish = _FINISH["gemini"][answer.finish]
        return {
            "candidates": [
                {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": finish, "index": index}
                for index, text in pairs
            ],
            "modelVersion": model,
            "usageMetadata": {"promptTokenCount": answer.prompt_tokens, "candidatesTokenCount": tokens},
        }, tokens
    finish = _FINISH["openai"][answer.finish]
    if call.dialect == "completions":
        choices = [{"index": index, "text": text, "finish_reason": finish} for index, text in pairs]
    else:
        choices = [
            {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
            for index, text in pairs
        ]
    usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": tokens}
    return {"id": "x", "object": call.dialect, "created": 1, "model": model, "choices": choices, "usage": usage}, tokens


class FaultServer:
    """An HTTP/1.1 server on loopback, on a thread of its own.

    Attributes:
      log: one object a call: the call, the status sent, the tokens billed (good answers only), how many were open.
    """

    def __init__(self, behave: Callable[[Call], Answer] = lambda call: Answer(), port: int = 0):
        self.behave = behave
        self.log: list[dict[str, Any]] = []
        self.open_calls = 0
        self.most_open_calls = 0
        self.port = port
        self.on_log: Callable[[dict[str, Any]], None] = lambda entry: None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._loop = asyncio.new_event_loop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The log without the probe's calls."""
        return [entry for entry in self.log if not entry["call"].is_probe]

    def __enter__(self) -> FaultServer:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Drops every connection and frees the port."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        server.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lines = head.split("\r\n")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in lines[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                path = lines[0].split(" ")[1]
                dialect = (
                    "gemini" if ":generateContent" in path
                    else "anthropic" if path.endswith("/messages")
                    else "chat" if path.endswith("/chat/completions")
                    else "completions"
                )  # fmt: skip
                parsed = json.loads(body or b"{}")
                if dialect == "gemini":
                    parsed["model"] = path.rsplit("/", 1)[-1].split(":")[0]
                await self._answer(Call(len(self.log), dialect, parsed, headers), writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, call: Call, writer: asyncio.StreamWriter) -> None:
        entry: dict[str, Any] = {"call": call, "status": "open", "prompt_tokens": 0, "completion_tokens": 0}
        self.log.append(entry)
        self.open_calls += 1
        self.most_open_calls = max(self.most_open_calls, self.open_calls)
        try:
            answer = self.behave(call)
            entry["status"] = answer.status
            await asyncio.sleep(answer.delay_s)
            content = answer.body
            if content is None and answer.status == 200:
                content, tokens = good_body(call, answer)
                entry |= {"prompt_tokens": answer.prompt_tokens, "completion_tokens": tokens}
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            head = f"HTTP/1.1 {answer.status} X\r\ncontent-type: {answer.content_type}\r\n"
            head += f"content-length: {len(data) + answer.pad_bytes}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
            writer.write(head.encode() + b"\r\n")
            if answer.cut_after is not None:
                writer.write(data[: answer.cut_after])
                await writer.drain()
                writer.transport.abort()
                raise ConnectionResetError
            if answer.drip_s is not None:
                for byte in data:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(answer.drip_s)
            else:
                block = b" " * 2**20
                for _ in range(answer.pad_bytes // len(block)):
                    writer.write(block)
                    await writer.drain()
                writer.write(b" " * (answer.pad_bytes % len(block)) + data)
                await writer.drain()
            entry["answered"] = True
        finally:
            self.open_calls -= 1
            self.on_log(entry)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", default="")
    parser.add_argument("--hold-after", type=int, default=-1, help="answers after this many calls never come")
    options = parser.parse_args()
    server = FaultServer(
        lambda call: Answer(delay_s=3600.0 if 0 <= options.hold_after <= call.number else 0.0), port=options.port
    )
    if options.log:
        log = open(options.log, "a", encoding="utf-8")  # noqa: SIM115  open as long as the server lives

        def write(entry: dict[str, Any]) -> None:
            log.write(json.dumps({"body": entry["call"].body, "answered": bool(entry.get("answered"))}) + "\n")
            log.flush()

        server.on_log = write
    with server:
        print(server.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
