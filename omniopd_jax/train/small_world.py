"""Builds a small world in a folder: data, and a teacher and a student trained from scratch on its texts.

FOLDER/train.jsonl  eval.jsonl     rows that data.prompts reads; validation.jsonl where it was asked for
FOLDER/teacher/  student/          Hugging Face layout (Qwen3), with a tokenizer of the world
FOLDER/world.json                  the settings; written last, so its presence says that the rest is complete
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from omniopd_jax import models, prng
from omniopd_jax.config import Config, WorldConfig
from omniopd_jax.data import load_tokenizer
from omniopd_jax.train import supervised
from omniopd_jax.types import InputError
from omniopd_jax.worlds import World, get_world, rows, tokenizers

_LOG = logging.getLogger(__name__)
_HEADS = 4

Progress = Callable[[str, int, int], None]  # (which model, steps done, steps in all)


def with_world(config: Config, workdir: Path) -> Config:
    """The config with the world's paths in every path that was left empty; builds the world if need be."""
    if not config.world.kind:
        return config
    folder = Path(config.world.path) if config.world.path else workdir / "world"
    build_world(config.world, folder)
    data, teacher = config.data, config.teacher
    teacher_path = teacher.path or (str(folder / "teacher") if teacher.kind == "local" else "")
    return dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, path=config.student.path or str(folder / "student")),
        teacher=dataclasses.replace(teacher, path=teacher_path),
        data=dataclasses.replace(
            data,
            train=data.train or str(folder / "train.jsonl"),
            eval=data.eval or str(folder / "eval.jsonl"),
        ),
    )


def build_world(settings: WorldConfig, folder: Path, progress: Progress | None = None) -> None:
    """Builds what is not there yet.

    Raises:
      InputError: the folder holds a world of other settings.
    """
    wanted = {name: value for name, value in dataclasses.asdict(settings).items() if name != "path"}
    marker = folder / "world.json"
    if marker.is_file():
        found = json.loads(marker.read_text(encoding="utf-8"))
        other = [name for name, value in wanted.items() if found.get(name) != value]
        if other:
            raise InputError(
                f"{folder} holds a world with {other[0]}={found.get(other[0])!r}, the config asks for "
                f"{wanted[other[0]]!r}: name another folder in config.world.path or delete this one."
            )
        return
    _LOG.info("Building the %s world in %s.", settings.kind, folder)
    rng = np.random.default_rng(settings.seed)
    world = get_world(settings.kind)
    held_out = world.problems(rng, settings.eval_problems, settings.size)
    train = world.problems(rng, settings.train_problems, settings.size, exclude=held_out)
    splits = {"train": train, "eval": held_out}
    if settings.validation_problems:
        own_rng = np.random.default_rng([settings.seed, 1])  # the other draws are the same with and without it
        splits["validation"] = world.problems(
            own_rng, settings.validation_problems, settings.size, exclude=[*held_out, *train]
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows(problems, name))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    _train_model(
        settings, world, folder / "teacher", train, rng, tokenizer_kind=settings.teacher_tokenizer,
        width=settings.teacher_width, layers=settings.teacher_layers, steps=settings.teacher_steps,
        mistakes=dict(misconception=settings.teacher_misconception), progress=progress,
    )  # fmt: skip
    _train_model(
        settings, world, folder / "student", train, rng, tokenizer_kind="words",
        width=settings.student_width, layers=settings.student_layers, steps=settings.student_steps,
        mistakes=dict(misconception=settings.misconception, slip=settings.slip), progress=progress,
    )  # fmt: skip
    marker.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def model_config(width: int, layers: int, *, vocab_size: int) -> models.DecoderConfig:
    """A Qwen3 with the special tokens of `worlds.tokenizers`."""
    return models.decoder_config(
        dict(
            architectures=["Qwen3ForCausalLM"],
            model_type="qwen3",
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=_HEADS,
            num_key_value_heads=_HEADS,
            head_dim=width // _HEADS,
            intermediate_size=8 * width // 3,
            hidden_act="silu",
            rms_norm_eps=1e-6,
            rope_theta=10_000.0,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizers.SPECIAL.index(tokenizers.STOP),
            pad_token_id=tokenizers.SPECIAL.index(tokenizers.PAD),
        )
    )


def _train_model(
    settings: WorldConfig,
    world: World,
    folder: Path,
    problems: list[Any],
    rng: np.random.Generator,
    *,
    tokenizer_kind: str,
    width: int,
    layers: int,
    steps: int,
    mistakes: dict[str, float],
    progress: Progress | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    world.save_tokenizer(str(folder), tokenizer_kind)
    tokenizer = load_tokenizer(folder)
    # Every text is used once: a problem comes up again in other words, with other mistakes.
    count = max(steps * settings.batch_size, settings.batch_size)
    chosen = [problems[i % len(problems)] for i in range(count)]
    answers = [world.solution(p, rng, phrasings=settings.phrasings, **mistakes) for p in chosen]
    name = folder.name
    decoder = model_config(width, layers, vocab_size=tokenizer.vocab_size)
    model = supervised.train_on_texts(
        models.init_model(decoder, prng.named_key(settings.seed, 0, name), jnp.float32),
        tokenizer,
        [problem.prompt(f"{name}-{i}") for i, problem in enumerate(chosen)],
        answers,
        steps=steps,
        batch_size=settings.batch_size,
        optimizer=supervised.adamw(settings.learning_rate, warmup_steps=min(50, steps // 4)),
        seed=settings.seed,
        progress=None if progress is None else lambda done, _: progress(name, done, steps),
    )
    models.save_model(folder, model, tokenizer.hf)
