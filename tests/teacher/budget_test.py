"""Prices, caps and the projection."""

import asyncio
import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base
from omniopd_jax.config import ConfigError, from_mapping
from omniopd_jax.teacher.budget import Budget, Caps, Price, find_price, projected_cost
from omniopd_jax.teacher.protocol import BudgetExhausted, Usage

ROOT = Path(__file__).resolve().parents[2]
PRICE = Price(input=1.0, output=5.0, date="2026-11-01")


def test_prices_are_dollars_a_million_tokens():
    assert PRICE.dollars(2_000_000, 100_000) == pytest.approx(2.5)


def test_dated_names_and_paths_find_their_price_and_others_none():
    assert find_price("claude-haiku-4-5-20251001") == find_price("claude-haiku-4-5")
    assert find_price("anthropic/claude-haiku-4-5") == find_price("claude-haiku-4-5")
    assert find_price("claude-opus-5-5").input < find_price("claude-opus-5").input  # the narrower name goes first
    assert find_price("/models/mine") is None


def test_every_price_is_dated_and_old_ones_are_called_old():
    for model in ("claude-haiku-4-5", "gemini-2.5-flash", "claude-opus-5"):
        datetime.date.fromisoformat(find_price(model).date)
    assert Price(1.0, 1.0, "2020-01-01").is_stale
    assert not Price(1.0, 1.0, datetime.date.today().isoformat()).is_stale


def test_a_users_price_goes_first(tmp_path):
    path = tmp_path / "prices.json"
    entry = {"model": "claude-haiku-4-5*", "input": 9, "output": 9, "date": "2026-11-02"}
    path.write_text(json.dumps({"prices": [entry]}))
    assert find_price("claude-haiku-4-5", str(path)).input == 9
    for broken in ({}, {"prices": [{"model": "*"}]}, {"prices": [entry | {"date": "yesterday"}]}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match=r"prices.json must be a JSON object"):
            find_price("claude-haiku-4-5", str(path))


def test_worst_cases_in_flight_count_and_are_replaced_by_what_it_was():
    async def run():
        budget = Budget(PRICE, Caps(tokens=1000))
        first = await budget.reserve(100, 500)
        second = asyncio.create_task(budget.reserve(100, 500))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not second.done()  # 600 in flight: 600 more could break the cap
        budget.settle(first, status="ok", prompt_tokens=90, completion_tokens=20)
        reserved = await asyncio.wait_for(second, 1.0)
        budget.settle(reserved, status="timeout", is_assumed=True)
        assert budget.spent == Usage(190, 520, 2, pytest.approx(PRICE.dollars(190, 520)))
        with pytest.raises(BudgetExhausted, match=r"max_tokens=1000: 2 calls, 710 tokens"):
            await budget.reserve(100, 500)
        await budget.reserve(90, 200)  # a smaller one still fits

    asyncio.run(run())


def test_no_cap_is_no_cap():
    async def run():
        budget = Budget(None, Caps())
        for _ in range(100):
            budget.settle(await budget.reserve(1e9, 1e9), status="ok", prompt_tokens=10**9)
        assert budget.spent.dollars == 0.0

    asyncio.run(run())


def _projected(kind, model, **teacher):
    values = base.get_config()
    values.teacher.update(kind=kind, model=model, **teacher)
    values.train.steps, values.rollout.batch_size, values.rollout.max_new_tokens = 10, 64, 1000
    values.audit.num_chunks, values.audit.chunk_tokens, values.audit.num_continuations = 4, 50, 8
    values.data.max_prompt_tokens = 1000
    return projected_cost(from_mapping(values))


def test_projection_in_numbers():
    text = _projected("anthropic", "claude-haiku-4-5", max_dollars=20.0)
    assert "about 2,048 calls, 3,072,000 prompt and 153,600 completion tokens a step; 20,480 calls in 10 steps" in text
    assert "about $3.84 a step, $38.40 in all" in text
    assert "The run stops at 20 dollars." in text
    assert "at most" not in text
    assert "An estimate: every chunk of every response is audited, 1 of 8 samples a call" in text
    text = _projected("openai", "mine", base_url="http://127.0.0.1:8000/v1")
    assert "No price is known" in text
    assert "No cap is set." in text


@pytest.mark.parametrize(
    ("kind", "model", "base_url", "calls"),
    [
        ("openai", "mine", "http://127.0.0.1:8000/v1", 256),  # one call brings all N
        ("openai", "deepseek-chat", "https://api.deepseek.com/beta", 2048),
        ("gemini", "gemini-2.5-flash", "", 256),
        ("gemini", "gemini-3.6-flash", "", 2048),
    ],
)
def test_projection_counts_as_many_samples_a_call_as_the_model_gives(kind, model, base_url, calls):
    assert f"about {calls:,} calls" in _projected(kind, model, base_url=base_url)


def test_projection_of_a_record_that_gives_some_a_call(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"records": [{"kind": "openai", "max_n": 3}]}))
    assert "about 768 calls" in _projected("openai", "mine", capabilities=str(path))  # 8 samples: 3 + 3 + 2


def test_projection_of_a_cap_in_dollars_without_a_price_is_refused():
    with pytest.raises(ConfigError, match="max_dollars needs a price for 'mine'"):
        _projected("openai", "mine", max_dollars=20.0)


def test_a_dry_run_prints_the_projection_and_makes_nothing(tmp_path):
    command = [
        sys.executable, "-m", "experiments.train", "--config=configs/tiny.py", f"--workdir={tmp_path}/run",
        "--config.teacher.kind=anthropic", "--config.teacher.model=claude-haiku-4-5", "--config.teacher.dry_run=True",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "claude-haiku-4-5: about 32 calls" in done.stdout
    assert not (tmp_path / "run").exists()
