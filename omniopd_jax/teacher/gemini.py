"""Google's dialect: `generateContent` of the Gemini API, several candidates a call where the model gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from omniopd_jax.teacher.dialect import Manner, Reply, Sample, common_sampling, whole_text
from omniopd_jax.teacher.modes import as_chat
from omniopd_jax.teacher.protocol import ContinuationRequest
from omniopd_jax.teacher.retry import CallFailed
from omniopd_jax.teacher.transport import guarded, http_client, json_of

OFFICIAL_URL = "https://generativelanguage.googleapis.com"
KEY_NAMES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")

_REFUSED = frozenset(
    {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "IMAGE_SAFETY", "MODEL_ARMOR"}
)
_ROLES = {"user": "user", "assistant": "model"}


class GeminiDialect:
    """Implements `Dialect`. `base_url` is "" for Google itself."""

    kind = "gemini"

    def __init__(self, model: str, *, base_url: str, api_key: str, timeout_s: float, max_connections: int):
        self._model = model
        self._url = base_url or OFFICIAL_URL
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._max_connections = max_connections
        self._http: Any = None
        self._sdk: Any = None

    def body(self, request: ContinuationRequest, manner: Manner) -> dict[str, Any]:
        if manner.mode == "completions":
            raise ValueError("Gemini has no completions route; choose config.teacher.mode='prefill' or 'instruct'.")
        chat = as_chat(request, manner.mode)
        turns = [*chat.turns, ("assistant", chat.prefill)] if chat.prefill else chat.turns
        config: dict[str, Any] = {
            "max_output_tokens": request.max_tokens,
            **common_sampling(request, manner),
            **manner.extra,
        }
        if chat.system:
            config["system_instruction"] = chat.system
        contents = [{"role": _ROLES[role], "parts": [{"text": content}]} for role, content in turns]
        return {"model": self._model, "contents": contents, "config": config}

    async def call(self, body: Mapping[str, Any], *, n: int, seed: int | None) -> Reply:
        self._sdk = self._sdk or self._connect()
        config = dict(body["config"]) | {
            "should_return_http_response": True,  # the plain JSON: some servers' answers do not fit the SDK's schema
            "automatic_function_calling": {"disable": True},
        }
        if n > 1:
            config["candidate_count"] = n
        if seed is not None:
            config["seed"] = seed
        response = await guarded(
            self._sdk.aio.models.generate_content(model=body["model"], contents=body["contents"], config=config)
        )
        raw = response.sdk_http_response
        headers = {name.lower(): value for name, value in (raw.headers or {}).items()}
        return read_reply(json_of((raw.body or "").encode(), headers.get("content-type", "")))

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    def _connect(self) -> Any:
        from google import genai

        self._http = http_client(self._url, timeout_s=self._timeout_s, max_connections=self._max_connections)
        options: Any = {
            "base_url": self._url,
            "timeout": int(self._timeout_s * 1000),
            "httpx_async_client": self._http,
            "retry_options": {"attempts": 1},
        }
        return genai.Client(api_key=self._api_key, vertexai=False, http_options=options)


def read_reply(body: Mapping[str, Any]) -> Reply:
    """Reads the candidates: the text of their parts, thoughts left out. A blocked prompt is one refused sample.

    Raises:
      CallFailed: there is neither a candidate nor a reason for its absence.
    """
    candidates = body.get("candidates")
    blocked = (body.get("promptFeedback") or {}).get("blockReason")
    if not candidates and not blocked:
        raise CallFailed("retry", "garbled", "the reply holds no candidates", is_charged=True)
    samples: dict[Any, Sample] = {}
    for position, candidate in enumerate(candidates or [{"finishReason": "PROHIBITED_CONTENT"}]):
        samples.setdefault(candidate.get("index", position), _sample(candidate))
    usage = body.get("usageMetadata") or {}
    return Reply(
        samples=tuple(samples.values()),
        model=whole_text(str(body.get("modelVersion") or "")).removeprefix("models/"),
        prompt_tokens=int(usage.get("promptTokenCount") or 0),
        completion_tokens=int(usage.get("candidatesTokenCount") or 0) + int(usage.get("thoughtsTokenCount") or 0),
    )


def _sample(candidate: Mapping[str, Any]) -> Sample:
    parts = (candidate.get("content") or {}).get("parts") or []
    text = "".join(str(part["text"]) for part in parts if "text" in part and not part.get("thought"))
    reason = candidate.get("finishReason")
    finish: Literal["stop", "length", "refused", "unusable"] = "unusable"
    if reason == "STOP":
        finish = "stop"
    elif reason == "MAX_TOKENS":
        finish = "length"
    elif reason in _REFUSED:
        finish = "refused"
    return Sample(whole_text(text), finish)
