"""OpenAI's dialect: the `completions` and `chat/completions` routes of OpenAI and of every server that speaks like it.

The official SDK carries the calls (address, keys, pooling, errors); bodies and replies are plain JSON, because what is
sent is also what a cached answer is filed under, and servers differ from OpenAI's own schema in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from omniopd_jax.teacher.dialect import Manner, Reply, Sample, common_sampling, whole_text
from omniopd_jax.teacher.modes import as_chat, begun_text
from omniopd_jax.teacher.protocol import ContinuationRequest
from omniopd_jax.teacher.retry import CallFailed
from omniopd_jax.teacher.transport import guarded, http_client, json_of
from omniopd_jax.types import Message

OFFICIAL_URL = "https://api.openai.com/v1"
KEY_NAMES = ("OPENAI_API_KEY",)

_ENDS = {"stop": "stop", "length": "length", "content_filter": "refused"}


class OpenAIDialect:
    """Implements `Dialect`.

    Args:
      model: the name asked for.
      base_url: the server's address, "" for OpenAI itself.
      api_key: "" for a server that wants none.
      render: the teacher's chat template, messages → the text before its answer; None where it is not known, then only
        raw prompts can go through the completions route.
    """

    kind = "openai"

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        api_key: str,
        timeout_s: float,
        max_connections: int,
        render: Callable[[tuple[Message, ...]], str] | None = None,
    ):
        self._model = model
        self._url = base_url or OFFICIAL_URL
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._max_connections = max_connections
        self._render = render
        self._sdk: Any = None

    def body(self, request: ContinuationRequest, manner: Manner) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, **common_sampling(request, manner)}
        if manner.mode == "completions":
            if request.is_raw:
                body["prompt"] = begun_text(request)
            elif self._render is not None:
                body["prompt"] = self._render(request.messages) + request.prefix
            else:
                raise ValueError(
                    "Mode completions needs the teacher's own chat template: let config.teacher.path name a folder "
                    "with its tokenizer, or choose config.teacher.mode='prefill' or 'instruct'."
                )
            return {**body, "max_tokens": request.max_tokens, **manner.extra}
        chat = as_chat(request, manner.mode)
        messages = [{"role": "system", "content": chat.system}] if chat.system else []
        messages += [{"role": role, "content": content} for role, content in chat.turns]
        if chat.prefill:
            turn: dict[str, Any] = {"role": "assistant", "content": chat.prefill}
            if manner.prefill == "prefix_flag":
                turn["prefix"] = True
            elif manner.prefill == "continue_final_message":
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            messages.append(turn)
        return {**body, "messages": messages, manner.max_tokens_name: request.max_tokens, **manner.extra}

    async def call(self, body: Mapping[str, Any], *, n: int, seed: int | None) -> Reply:
        import httpx2

        sent = dict(body)
        if n > 1:  # some servers refuse the field, whatever it says
            sent["n"] = n
        if seed is not None:
            sent["seed"] = seed
        route = "/completions" if "prompt" in sent else "/chat/completions"
        self._sdk = self._sdk or self._connect()
        response = await guarded(self._sdk.post(route, cast_to=httpx2.Response, body=sent))
        return read_reply(json_of(response.content, response.headers.get("content-type", "")))

    async def close(self) -> None:
        if self._sdk is not None:
            await self._sdk.close()

    def _connect(self) -> Any:
        import openai

        return openai.AsyncOpenAI(
            api_key=self._api_key or "none",  # the SDK insists on one; servers that need none ignore it
            base_url=self._url,
            max_retries=0,
            timeout=self._timeout_s,
            http_client=http_client(self._url, timeout_s=self._timeout_s, max_connections=self._max_connections),
        )


def read_reply(body: Mapping[str, Any]) -> Reply:
    """Reads the JSON of either route. Choices that repeat an earlier one's index are dropped.

    Raises:
      CallFailed: there is no choice to read.
    """
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise CallFailed("retry", "garbled", "the reply holds no choices", is_charged=True)
    samples: dict[Any, Sample] = {}
    for position, choice in enumerate(choices):
        if not isinstance(choice, dict):
            raise CallFailed("retry", "garbled", "a choice is not an object", is_charged=True)
        samples.setdefault(choice.get("index", position), _sample(choice))
    usage = body.get("usage") or {}
    return Reply(
        samples=tuple(samples.values()),
        model=whole_text(str(body.get("model") or "")),
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
    )


def _sample(choice: Mapping[str, Any]) -> Sample:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    finish: Literal["stop", "length", "refused", "unusable"] = _ENDS.get(choice.get("finish_reason"), "unusable")  # type: ignore[assignment]
    if isinstance(message, dict) and message.get("refusal"):
        finish = "refused"
    if not isinstance(text, str):
        return Sample("", finish if finish == "refused" else "unusable")
    return Sample(whole_text(text), finish)
