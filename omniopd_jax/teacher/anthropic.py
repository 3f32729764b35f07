"""Anthropic's dialect: the messages route. One sample a call, no seed, no log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from omniopd_jax.teacher.dialect import Manner, Reply, Sample, common_sampling, whole_text
from omniopd_jax.teacher.modes import as_chat
from omniopd_jax.teacher.protocol import ContinuationRequest
from omniopd_jax.teacher.retry import CallFailed
from omniopd_jax.teacher.transport import guarded, http_client, json_of

OFFICIAL_URL = "https://api.anthropic.com"
KEY_NAMES = ("ANTHROPIC_API_KEY",)

_ENDS: dict[Any, Literal["stop", "length", "refused"]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "refusal": "refused",
}


class AnthropicDialect:
    """Implements `Dialect`. `base_url` is "" for Anthropic itself."""

    kind = "anthropic"

    def __init__(self, model: str, *, base_url: str, api_key: str, timeout_s: float, max_connections: int):
        self._model = model
        self._url = base_url or OFFICIAL_URL
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._max_connections = max_connections
        self._sdk: Any = None

    def body(self, request: ContinuationRequest, manner: Manner) -> dict[str, Any]:
        if manner.mode == "completions":
            raise ValueError("Anthropic has no completions route; choose config.teacher.mode='prefill' or 'instruct'.")
        chat = as_chat(request, manner.mode)
        messages = [{"role": role, "content": content} for role, content in chat.turns]
        if chat.prefill:  # no white space at its end, which the API would refuse
            messages.append({"role": "assistant", "content": chat.prefill})
        body = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            "messages": messages,
            **common_sampling(request, manner),
            **manner.extra,
        }
        return body | {"system": chat.system} if chat.system else body

    async def call(self, body: Mapping[str, Any], *, n: int, seed: int | None) -> Reply:
        import httpx2

        self._sdk = self._sdk or self._connect()
        response = await guarded(self._sdk.post("/v1/messages", cast_to=httpx2.Response, body=dict(body)))
        return read_reply(json_of(response.content, response.headers.get("content-type", "")))

    async def close(self) -> None:
        if self._sdk is not None:
            await self._sdk.close()

    def _connect(self) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(
            api_key=self._api_key,
            base_url=self._url,
            max_retries=0,
            timeout=self._timeout_s,
            http_client=http_client(self._url, timeout_s=self._timeout_s, max_connections=self._max_connections),
        )


def read_reply(body: Mapping[str, Any]) -> Reply:
    """Reads a message: the text of its text blocks, thoughts left out.

    Raises:
      CallFailed: there is no message to read.
    """
    blocks = body.get("content")
    if not isinstance(blocks, list) or "stop_reason" not in body:
        raise CallFailed("retry", "garbled", "the reply holds no message", is_charged=True)
    texts = [block.get("text") for block in blocks if isinstance(block, dict) and block.get("type") == "text"]
    usage = body.get("usage") or {}
    cached = ("cache_creation_input_tokens", "cache_read_input_tokens")
    return Reply(
        samples=(Sample(whole_text("".join(map(str, texts))), _ENDS.get(body["stop_reason"], "unusable")),),
        model=whole_text(str(body.get("model") or "")),
        prompt_tokens=sum(int(usage.get(name) or 0) for name in ("input_tokens", *cached)),
        completion_tokens=int(usage.get("output_tokens") or 0),
    )
