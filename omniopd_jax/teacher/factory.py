"""`make_teacher`: the teacher that a config describes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omniopd_jax.config import ConfigError, TeacherConfig
from omniopd_jax.teacher import anthropic, gemini, openai
from omniopd_jax.teacher.budget import Budget, Caps, run_price
from omniopd_jax.teacher.cache import Cache
from omniopd_jax.teacher.capabilities import find_capability
from omniopd_jax.teacher.client import ApiTeacher
from omniopd_jax.teacher.dialect import Dialect
from omniopd_jax.teacher.protocol import Teacher
from omniopd_jax.teacher.redaction import Redactor, key_from_environment
from omniopd_jax.teacher.retry import RetryPolicy
from omniopd_jax.teacher.scripted import scripted_teacher
from omniopd_jax.teacher.transport import check_address
from omniopd_jax.types import Message

CACHE_FILE = "teacher_cache.sqlite"
CALLS_FILE = "teacher_calls.jsonl"
_VENDORS = {"openai": openai, "anthropic": anthropic, "gemini": gemini}


def make_teacher(
    config: TeacherConfig,
    *,
    workdir: Path,
    run_seed: int,
    template_args: Mapping[str, Any] | None = None,
    is_raw: bool = False,
    policy: RetryPolicy | None = None,
) -> Teacher:
    """Builds the teacher of `config.teacher`; nothing is sent before its `probe`.

    Args:
      workdir: of the run: the cache, the ledger of calls and the probe's finding lie there.
      run_seed: `train.seed`.
      template_args: `data.template_args`, for the teacher's own chat template in mode completions.
      is_raw: prompts are raw texts (`data.use_chat_template=False`).
      policy: the retry policy, by default ours with `teacher.max_attempts`.

    Raises:
      ConfigError: a setting that cannot work; no secret is in its message.
    """
    if config.kind == "scripted":
        return scripted_teacher(config.script)
    if config.kind == "local":
        from omniopd_jax.teacher.local import load_teacher

        return load_teacher(config.path, template_args=template_args, attention=config.attention)
    if not config.model:
        raise ConfigError("config.teacher.model must name the model to ask for; no model is a default.")
    capability = find_capability(config.kind, config.model, config.base_url, config.capabilities)
    vendor = _VENDORS[config.kind]
    url = config.base_url or vendor.OFFICIAL_URL
    check_address(url, allow_insecure_http=config.allow_insecure_http)
    api_key = "" if config.replay_only or config.dry_run else _key(config, vendor.KEY_NAMES)
    price = run_price(config)
    cache_path = Path(config.cache_path) if config.cache_path else workdir / CACHE_FILE
    if config.cache_path == "off" and config.replay_only:
        raise ConfigError("config.teacher.replay_only needs a cache, but config.teacher.cache_path is 'off'.")
    return ApiTeacher(
        _dialect(config, url, api_key, template_args or {}),
        config,
        capability,
        workdir=workdir,
        cache=None if config.cache_path == "off" else Cache(cache_path),
        budget=Budget(
            price, Caps(config.max_dollars, config.max_calls, config.max_tokens), ledger=workdir / CALLS_FILE
        ),
        policy=policy or RetryPolicy(max_attempts=config.max_attempts),
        redact=Redactor([api_key]),
        is_raw=is_raw,
        run_seed=run_seed,
    )


def chat_renderer(path: str, template_args: Mapping[str, Any]) -> Callable[[tuple[Message, ...]], str]:
    """The teacher's chat template: messages → the text before its answer.

    A start token that the tokenizer would add anyway is left to the server, or it would stand there twice.

    Raises:
      InputError: the folder holds no tokenizer, or (on use) the tokenizer no chat template.
    """
    from omniopd_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    hf: Any = tokenizer.hf
    start = hf.bos_token or ""
    adds_start = bool(start) and hf("x")["input_ids"][:1] == [hf.bos_token_id]

    @functools.lru_cache(maxsize=4096)
    def render(messages: tuple[Message, ...]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text = tokenizer.render_messages(turns, template_args, add_generation_prompt=True)
        return text.removeprefix(start) if adds_start else text

    return render


def _dialect(config: TeacherConfig, url: str, api_key: str, template_args: Mapping[str, Any]) -> Dialect:
    shared: dict[str, Any] = {
        "base_url": url,
        "api_key": api_key,
        "timeout_s": config.request_timeout_s,
        "max_connections": config.max_concurrency,
    }
    if config.kind == "anthropic":
        return anthropic.AnthropicDialect(config.model, **shared)
    if config.kind == "gemini":
        return gemini.GeminiDialect(config.model, **shared)
    render = chat_renderer(config.path, template_args) if config.path else None
    return openai.OpenAIDialect(config.model, render=render, **shared)


def _key(config: TeacherConfig, names: tuple[str, ...]) -> str:
    key = key_from_environment(config.api_key_env, names)
    if not key and not (config.kind == "openai" and config.base_url):
        raise ConfigError(f"No API key: set {names[0]} in the environment, or name another variable in "
                          "config.teacher.api_key_env.")  # fmt: skip
    return key
