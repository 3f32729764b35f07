"""Work directories made from a seed: a plausible run, and one whose model writes the most hostile text there is."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

PHRASINGS = (
    "add {a} and {b} with {c} gives {s} ; ",
    "{a} plus {b} plus {c} makes {s} ; ",
    "column {a} {b} carry {c} sum {s} ; ",
)
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'> <b>bold</b> &amp; &lt;",
    "<!-- <script> ]]> {{head}} ${1} </style><style>body{display:none}</style>",
    "a right-to-left override: \u202egnp.exe\u202c and an isolate \u2067left\u2069 end",
    "lone surrogates \ud800 and \udfff, a null \x00, an escape \x1b[31m, a bell \x07",
    "العربية من اليمين إلى اليسار 123 ثم English",
    "Z\u0351\u034c\u0302a\u0323\u0334l\u0489g\u0315\u0358o\u0336 " + "\u0301" * 200,
    "line separators \u2028 \u2029 \r\n tabs\t\t and zero\u200bwidth\ufeff",
    "javascript:alert(1) \" ' ` onload=alert(1)",
    "👩‍👩‍👧‍👦🏳️‍🌈 𝔸𝕓𝕔 素早い茶色の狐がのろまな犬を飛び越える",
    "W" * 3000,
)


def config(steps: int = 120, seed: int = 0, arm: str = "verify", **changes: Any) -> dict[str, Any]:
    """A config.json; `changes`: {"section.knob": value} with __ for the dot."""
    values: dict[str, Any] = {
        "train": {"steps": steps, "seed": seed},
        "objective": {"arm": arm, "prior_strength": 1.0, "anchor_weight": 0.1, "anchor_tokens": "unaudited"},
        "optimizer": {"learning_rate": 2e-4},
        "rollout": {"batch_size": 8, "samples_per_prompt": 1, "max_new_tokens": 96},
        "audit": {"num_chunks": 4, "chunk_tokens": 8, "num_continuations": 6, "similarity": "edit"},
        "student": {"path": "models/student"},
        "teacher": {"kind": "local", "path": "models/teacher"},
    }
    for name, value in changes.items():
        section, _, knob = name.partition("__")
        values[section][knob] = value
    return values


def write_run(
    path: Path,
    *,
    steps: int = 120,
    seed: int = 0,
    arm: str = "verify",
    responses: int = 8,
    quality: float = 0.9,
    hostile: bool = False,
    done: bool = True,
    **changes: Any,
) -> Path:
    """Writes a work directory: `steps` of them, `responses` each, four chunks a response.

    Args:
      quality: accuracy at the end.
      hostile: model text that attacks the page, broken lines, and a last line torn by a crash.
      done: False leaves the run half way, without result.json.
    """
    rng = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    settings = config(steps if done else 2 * steps, seed, arm, **changes)
    (path / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    if done:
        (path / "result.json").write_text(json.dumps(_result(quality, rng)), encoding="utf-8")
    problems = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(40 * responses)]
    with (
        (path / "metrics.jsonl").open("w", encoding="utf-8") as metrics,
        (path / "rollouts.jsonl").open("w", encoding="utf-8") as rollouts,
        (path / "audits.jsonl").open("w", encoding="utf-8") as audits,
    ):
        for step in range(1, steps + 1):
            share = step / steps
            metrics.write(json.dumps(_metrics(step, share, quality, arm, rng)) + "\n")
            for row in range(responses):
                number = ((step - 1) * responses + row) % len(problems)
                rollout, found = _response(step, row, number, problems[number], share, arm, rng, hostile)
                rollouts.write(json.dumps(rollout) + "\n")
                audits.writelines(json.dumps(audit) + "\n" for audit in found)
    if hostile:
        _damage(path)
    return path


def _result(quality: float, rng: random.Random) -> dict[str, Any]:
    def accuracy(value: float) -> dict[str, float]:
        value = round(min(1.0, max(0.0, value + rng.gauss(0, 0.01))), 4)
        return {"accuracy": value, "standard_error": round(math.sqrt(value * (1 - value) / 1000), 4)}

    return {
        "problems": 1000,
        "before": {"greedy": accuracy(0.305), "sampled": accuracy(0.329)},
        "after": {"greedy": accuracy(quality), "sampled": accuracy(0.8 * quality)},
    }


def _metrics(step: int, share: float, quality: float, arm: str, rng: random.Random) -> dict[str, float]:
    def noisy(value: float, noise: float) -> float:
        return round(value * math.exp(rng.gauss(0, noise)), 6)

    rise = 1 - math.exp(-4 * share)
    row = {
        "step": step,
        "loss/total": noisy(0.62 - 0.3 * rise, 0.05),
        "loss/trunk": noisy(0.55 - 0.3 * rise, 0.05),
        "loss/anchor": noisy(0.004 + 0.02 * rise, 0.1),
        "anchor/kl": noisy(0.0005 + 0.21 * rise, 0.1),
        "anchor/fraction": min(1.0, noisy(0.52, 0.03)),
        "optimizer/grad_norm": noisy(1.8 - rise, 0.25),
        "optimizer/update_norm": noisy(0.02, 0.1),
        "optimizer/learning_rate": 2e-4 * min(1.0, step / 5),
        "rollout/tokens": noisy(34.5 + rise, 0.01),
        "rollout/finished": min(1.0, noisy(0.97, 0.01)),
        "rollout/empty": 0,
        "rollout/entropy": noisy(0.42 - 0.2 * rise, 0.04),
        "rollout/logprob": -noisy(0.41 - 0.2 * rise, 0.04),
        "rollout/epoch": step / 80,
        "audit/audited": min(1.0, noisy(0.99, 0.01)),
        "audit/fraction": min(1.0, noisy(0.48, 0.03)),
        "audit/entropy": noisy(1.1 - 0.3 * rise, 0.05),
        "audit/prior": min(1.0, noisy(0.5 + 0.2 * rise, 0.03)),
        "audit/target": min(1.0, noisy(0.45 + 0.3 * rise, 0.04)),
        "audit/advantage": noisy(0.4 - 0.2 * rise, 0.05),
        "audit/agreement_mean": min(1.0, noisy(0.78, 0.02)),
        "audit/moved_cuts": 0.0,
        "teacher/missing_share": max(0.0, round(rng.gauss(0.004, 0.006), 4)),
        "teacher/refused_share": 0.0,
        "teacher/total_tokens": 1290 * step,
        "teacher/total_prompt_tokens": 5200 * step,
        "teacher/total_calls": 32 * step,
        "teacher/total_dollars": round(0.0031 * step, 5),
        "time/sample_s": noisy(0.11, 0.1),
        "time/score_s": noisy(0.05, 0.1),
        "time/audit_s": noisy(0.16, 0.15),
        "time/update_s": noisy(0.12, 0.1),
        "time/step_s": noisy(0.46, 0.1),
        "compile/programs": 3 if step == 1 else 0,
    }
    if arm == "branch":
        row |= {"loss/branch": noisy(0.05 - 0.04 * rise, 0.2), "branch/kept": noisy(5.5, 0.05)}
    if step % 20 == 0:
        row |= {
            "eval/greedy_accuracy": round(0.305 + (quality - 0.305) * rise, 4),
            "eval/greedy_standard_error": 0.014,
            "eval/sampled_accuracy": round(0.329 + (0.8 * quality - 0.329) * rise, 4),
            "eval/sampled_standard_error": 0.014,
        }
    return row


def _solution(left: int, right: int, right_share: float, rng: random.Random) -> list[str]:
    """Tokens of one written-out addition, each carry forgotten with probability 1 − right_share."""
    carry, digits, text = 0, [], ""
    for place in range(3):
        a, b = left // 10**place % 10, right // 10**place % 10
        total = a + b + carry
        text += rng.choice(PHRASINGS).format(a=a, b=b, c=carry, s=f"{total // 10} {total % 10}")
        digits.append(total % 10)
        carry = total // 10 if rng.random() < right_share else 0
    digits.append(carry)
    text += "answer " + " ".join(str(digit) for digit in reversed(digits))
    return [*[word + " " for word in text.split()][:-1], text.split()[-1], ""]


def _response(
    step: int,
    row: int,
    number: int,
    problem: tuple[int, int],
    share: float,
    arm: str,
    rng: random.Random,
    hostile: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    left, right = problem
    tokens = _solution(left, right, 0.4 + 0.55 * share, rng)
    entropy = [round(abs(rng.gauss(0, 0.9 if token[:1].isalpha() else 0.15)), 4) for token in tokens]
    logprob = [round(-abs(rng.gauss(0, 0.1 + value)), 4) for value in entropy]
    prompt_id = f"additions:{number}"
    prompt = f"{' '.join(f'{left:03d}')} + {' '.join(f'{right:03d}')} ="
    if hostile:
        prompt = f"{prompt} {HOSTILE[number % len(HOSTILE)]}"
        tokens = [
            f"{token}{HOSTILE[(step + i) % len(HOSTILE)]} " if i % 9 == 4 else token for i, token in enumerate(tokens)
        ]
    rollout = {
        "step": step,
        "response": row,
        "prompt_id": prompt_id,
        "prompt": prompt,
        "tokens": tokens,
        "entropy": entropy,
        "logprob": logprob,
        "is_finished": rng.random() < 0.97,
        "answer": str(left + right),
    }
    width = 8
    starts = sorted(range(0, len(tokens) - width, width), key=lambda start: -entropy[start])[:4]
    audits = [
        _audit(step, row, prompt_id, slot, start, tokens[start : start + width], entropy, logprob, arm, rng, hostile)
        for slot, start in enumerate(sorted(starts))
    ]
    return rollout, audits


def _audit(
    step: int,
    row: int,
    prompt_id: str,
    slot: int,
    start: int,
    chunk_tokens: list[str],
    entropy: list[float],
    logprob: list[float],
    arm: str,
    rng: random.Random,
    hostile: bool,
) -> dict[str, Any]:
    chunk = "".join(chunk_tokens)
    continuations = [
        {
            "text": text,
            "score": round(_likeness(chunk, text), 4),
            "finish_reason": rng.choice(["length", "length", "stop"]),
        }
        for text in (_varied(chunk_tokens, rng) for _ in range(6 if rng.random() < 0.9 else 5))
    ]
    if hostile:
        continuations[0]["text"] += HOSTILE[(step + row + slot) % len(HOSTILE)]
    width = len(chunk_tokens)
    total = round(sum(each["score"] for each in continuations), 4)
    prior = math.exp(sum(logprob[start : start + width]) / width)
    target = (total + prior) / (len(continuations) + 1)
    record = {
        "step": step,
        "response": row,
        "prompt_id": prompt_id,
        "slot": slot,
        "start": start,
        "moved": 0,
        "num_tokens": width,
        "entropy": entropy[start],
        "chunk": chunk,
        "is_end": False,
        "continuations": continuations,
        "branches": [],
        "prior": round(prior, 4),
        "score_sum": total,
        "count": len(continuations),
        "requested": 6,
        "target": round(target, 4),
        "weight": round(target, 4),
        "logprob": round(sum(logprob[start : start + width]), 4),
    }
    if arm == "branch":
        texts = [_varied(chunk_tokens, rng) for _ in range(8)]
        scores = [sum(_likeness(text, each["text"]) for each in continuations) / len(continuations) for text in texts]
        mean = sum(scores) / len(scores)
        record["branches"] = [
            {"text": text, "score": round(score, 4), "weight": round(score - mean, 4)}
            for text, score in zip(texts, scores, strict=True)
        ]
    return record


def _varied(tokens: list[str], rng: random.Random) -> str:
    words = [
        rng.choice(["with ", "carry ", "plus "]) if token[:1].isalpha() and rng.random() < 0.3 else token
        for token in tokens
    ]
    return "".join(
        rng.choice("0123456789") + " " if word[:1].isdigit() and rng.random() < 0.2 else word for word in words
    )


def _likeness(a: str, b: str) -> float:
    if not a and not b:
        return 1.0
    return sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b))


def _damage(path: Path) -> None:
    """What a crash and a hostile model leave: a megabyte line, broken UTF-8, lines of nonsense, a torn last line."""
    lines = (path / "audits.jsonl").read_text(encoding="utf-8").splitlines()
    long = json.loads(lines[0])
    long["chunk"] = "M" * 2**20
    long["continuations"][0]["text"] = "素" * 2**20
    long["branches"] = "not a list"
    long["target"] = float("nan")
    long["prior"] = "high"
    lines[0] = json.dumps(long)
    lines[5] = '{"step": 1, "response": "x", "slot": [1]}'
    lines[6] = "[1, 2, 3]"
    lines[7] = "[" * 50_000
    lines[8] = '{"step": -1, "response": 0, "slot": 0}'
    text = "\n".join(lines) + "\n"
    (path / "audits.jsonl").write_bytes(
        text.encode() + b'{"step": 120, "response": 7, "slot": 1, "chunk": "\xff\xfe torn'
    )
    rollouts = (path / "rollouts.jsonl").read_bytes().splitlines()
    first = json.loads(rollouts[0])
    first["tokens"] = [*first["tokens"][:-1], "x " * 2**19, ""]
    first["entropy"] = [None, "a", 1e400, *first["entropy"]]
    rollouts[0] = json.dumps(first).encode()
    rollouts[1] = rollouts[1].replace(b"answer", b"ans\xff\xc3er")
    (path / "rollouts.jsonl").write_bytes(b"\n".join(rollouts) + b"\n" + rollouts[2][: len(rollouts[2]) // 2])
    with (path / "metrics.jsonl").open("ab") as metrics:
        metrics.write(
            b'{"step": 120, "loss/<script>alert(1)</script>": 1.0, "loss/total": NaN}\n{"step": 121, "loss/to'
        )
