"""One prompt, step by step, nothing trained: what the student writes, where it hesitates, what the teacher says there.

    python -m experiments.audit --config=configs/gsm8k.py --prompt="What is 3 + 4?" \\
        --config.student.path=STUDENT --config.teacher.path=TEACHER

Works with any teacher that the config names. What an API teacher answered is kept in WORKDIR/teacher_cache.sqlite, so
the same question is paid for once; nothing else is left behind. Colours show entropy where the terminal can; --seed
draws anew.
"""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from experiments import command
from omniopd_jax.config import Config, TeacherConfig
from omniopd_jax.teacher.factory import CACHE_FILE
from omniopd_jax.types import Anchors, InputError

_CONFIG = command.define_config()
_PROMPT = flags.DEFINE_string("prompt", None, "The user's message, or the exact text without a chat template.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the teacher's cache, by default runs/audit.")
_ANSWER_SEED = flags.DEFINE_integer("seed", 0, "Draws another response.")
flags.mark_flags_as_required(["config", "prompt"])

_SHADES = (0, 226, 220, 214, 208, 202)  # 256-colour backgrounds, from none to strong


def main() -> None:
    import jax

    config = command.read_config(_CONFIG)
    # One response is shown. As many are sampled as there are devices, for a mesh takes all devices and each its share;
    # they are of one prompt, and only the first is audited.
    rows = jax.device_count()
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, batch_size=rows, samples_per_prompt=rows, slots=0),
        train=dataclasses.replace(config.train, seed=_ANSWER_SEED.value, micro_batch_size=0),
        pipeline=dataclasses.replace(config.pipeline, micro_batches=1, rollouts=0),
        mesh=dataclasses.replace(config.mesh, data=1, fsdp=-1, tensor=1),
        eval=dataclasses.replace(config.eval, every=0),
        logging=dataclasses.replace(config.logging, tensorboard=False, wandb=""),
    )
    config = dataclasses.replace(config, teacher=with_kept_cache(config.teacher, _WORKDIR.value))
    with tempfile.TemporaryDirectory() as folder:
        _show(config, Path(folder))


def with_kept_cache(teacher: TeacherConfig, workdir: str | None) -> TeacherConfig:
    """The teacher with its cache in the work directory, which is made, where answers are paid for."""
    if teacher.kind in ("local", "scripted") or teacher.cache_path:
        return teacher
    folder = command.workdir(workdir, "runs/audit")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={folder} cannot be made: {error.strerror or error}.") from error
    return dataclasses.replace(teacher, cache_path=str(folder / CACHE_FILE))


def first_alone(anchors: Anchors) -> Anchors:
    """The anchors of row 0: the teacher is asked about no other."""
    is_first_B = np.arange(anchors.is_valid_BxM.shape[0]) == 0
    return dataclasses.replace(anchors, is_valid_BxM=anchors.is_valid_BxM & is_first_B[:, None])


def _show(config: Config, workdir: Path) -> None:
    from omniopd_jax.train.credit import needs_of
    from omniopd_jax.train.experiment import prepare
    from omniopd_jax.train.loop import Clock
    from omniopd_jax.train.observation import observe
    from omniopd_jax.train.stops import Interrupts
    from omniopd_jax.types import Message, Prompt

    is_raw = not config.data.use_chat_template
    system = (Message("system", config.data.system_prompt),) if config.data.system_prompt else ()
    prompt = Prompt("prompt", (*system, Message("user", str(_PROMPT.value))), is_raw=is_raw)
    if not needs_of(config).chunks:
        raise InputError(
            f"config.objective.arm={config.objective.arm!r} audits no chunks: choose verify, branch or imitate."
        )
    experiment = prepare(config, workdir, prompts=[prompt])
    choose = experiment.student.choose
    experiment.student = experiment.student._replace(choose=lambda *seen: first_alone(choose(*seen)))
    try:
        seen = observe(experiment, 0, Clock(), Interrupts())
    finally:
        experiment.close()
    length = int(seen.rollout.mask_BxT[0].sum())
    words = experiment.tokenizer.running_texts(seen.rollout.tokens_BxT[0, :length].tolist())
    entropy = np.asarray(seen.rollout.entropy_BxT)[0, :length].tolist()
    print(f"prompt    {_PROMPT.value}\nteacher   {experiment.teacher.name}\n")
    print(f"response, {length} tokens; entropy {_scale()} nats\n")
    print(_joined(words, entropy, {audit["start"] for audit in seen.audits}) + "\n")
    for audit in seen.audits:
        print(
            f"[{audit['start']}]  entropy {audit['entropy']:.2f}   prior {audit['prior']:.3f}"
            f"   k = {audit['score_sum']:.2f} of n = {audit['count']}"
            + (f"   target {audit['target']:.3f}" if audit["target"] is not None else "")
        )
        print(f"      student   {audit['chunk']!r}")
        for continuation in sorted(audit["continuations"], key=lambda found: -found["score"]):
            print(f"      teacher   {continuation['score']:.2f}  {continuation['text']!r}")
        for branch in sorted(audit["branches"], key=lambda found: -found["score"]):
            print(f"      branch    {branch['score']:.2f}  weight {branch['weight']:+.3f}  {branch['text']!r}")
    if not seen.audits:
        print(f"No chunk of {config.audit.chunk_tokens} tokens fits into this response: nothing is audited.")


def _has_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _shade(entropy: float) -> int:
    return _SHADES[min(int(entropy * 2.5), len(_SHADES) - 1)]


def _scale() -> str:
    if not _has_colour():
        return "is shown below, in"
    return " ".join(_coloured(f" {value:.1f} ", value) for value in (0.2, 0.6, 1.0, 1.4, 1.8, 2.2))


def _coloured(text: str, entropy: float) -> str:
    shade = _shade(entropy)
    return f"\x1b[48;5;{shade}m\x1b[30m{text}\x1b[0m" if _has_colour() and shade else text


def _joined(words: list[str], entropy: list[float], starts: set[int]) -> str:
    """The response with entropy as colour; each audited chunk begins with its position in brackets."""
    # What a model wrote must not steer the terminal.
    safe = [word if word.isprintable() or word in ("\n", "\t") else repr(word)[1:-1] for word in words]
    return "".join((f"[{i}]" if i in starts else "") + _coloured(word, entropy[i]) for i, word in enumerate(safe))


if __name__ == "__main__":
    command.run(main)
