"""Laws of prompt files and of the order in which a run meets them."""

import gzip
import json
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from omniopd_jax.data import PromptError, PromptStream, load_tokenizer, pad_prompts, read_prompts
from omniopd_jax.data.prompts import bucket_width
from omniopd_jax.types import Message, Prompt
from tests.tiny_tokenizers import save_byte_level

DATA = Path(os.environ.get("OMNIOPD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def prompts():
    return [Prompt(f"p{i}", (Message("user", "word " * (1 + i % 5)),)) for i in range(13)]


def _write(path: Path, *rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


USER = ({"role": "user", "content": "2+2?"},)
LAYOUTS = {
    "trl text": ({"prompt": "2+2?"}, ""),
    "trl chat": ({"prompt": [*USER]}, ""),
    "trl messages": ({"messages": [*USER, {"role": "assistant", "content": "4"}]}, "4"),
    "gsm8k": ({"question": "2+2?", "answer": "#### 4"}, "#### 4"),
    "problem": ({"problem": "2+2?", "solution": 4}, "4"),
    "verl": ({"data_source": "x", "prompt": [*USER], "reward_model": {"style": "rule", "ground_truth": "4"}}, "4"),
    "content parts": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]}, ""),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_layouts_of_other_trainers(name, suffix, tmp_path):
    row, answer = LAYOUTS[name]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(json.dumps(row).encode()))
    else:
        _write(path, row)
    assert read_prompts(path) == [Prompt("rows:0", (Message("user", "2+2?"),), answer=answer)]


def test_ids_system_prompt_and_named_columns(tmp_path):
    path = _write(tmp_path / "x.jsonl", {"id": 7, "text": "a", "out": {"gold": 1}}, "", {"text": "b"})
    first, second = read_prompts(path, "text", "out.gold", system_prompt="S")
    assert first == Prompt("7", (Message("system", "S"), Message("user", "a")), answer="1")
    assert second == Prompt("x:1", (Message("system", "S"), Message("user", "b")))
    (raw, _) = read_prompts(path, "text", is_raw=True)
    assert raw == Prompt("7", (Message("user", "a"),), is_raw=True)


BAD = {
    "bad json": ([{"prompt": "a"}, "{'x'"], r"rows\.jsonl line 2 is not JSON"),
    "not an object": (["[1]"], r"line 1 is not an object"),
    "no prompt": ([{"prompt": "a"}, {"text": "b"}], r"line 2 has no prompt: expected prompt or .*found text"),
    "empty prompt": ([{"prompt": ""}], r"line 1 has no prompt"),
    "no user turn": ([{"prompt": [{"role": "system", "content": "x"}]}], r"line 1 has no prompt.*no user turn"),
    "bad role": ([{"prompt": [{"role": "tool", "content": "x"}]}], r"line 1: a message has a role"),
    "bad content": ([{"prompt": [{"role": "user", "content": 3}]}], r"line 1: the content of a message is text"),
    "number": ([{"prompt": 3}], r"line 1: a prompt is a text or a list"),
    "same id": ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], r"line 1 and line 2 have the same id '1'"),
    "empty file": ([], r"rows\.jsonl holds no prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_their_line(name, tmp_path):
    rows, message = BAD[name]
    with pytest.raises(PromptError, match=message):
        read_prompts(_write(tmp_path / "rows.jsonl", *rows))


def test_equal_rows_are_one_prompt_with_the_first_ones_id_and_place(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="omniopd_jax")
    first, second, third = (
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "answer": "1"},
        {"prompt": "a", "answer": "2"},
    )
    once = read_prompts(_write(tmp_path / "rows.jsonl", first, second, third))
    assert [prompt.id for prompt in once] == ["rows:0", "rows:1", "rows:2"], "another prompt or answer, another row"
    assert not caplog.records
    noted = {**first, "index": 7}  # columns that are neither prompt nor answer nor id tell nothing apart
    again = read_prompts(_write(tmp_path / "rows.jsonl", first, noted, second, first, third, second))
    assert [prompt.id for prompt in again] == ["rows:0", "rows:2", "rows:4"], "named by their place in the file"
    assert [(p.messages, p.answer) for p in again] == [(p.messages, p.answer) for p in once]
    (record,) = caplog.records
    assert "6 rows hold 3 different prompts" in record.getMessage()
    named = read_prompts(
        _write(tmp_path / "rows.jsonl", {"id": "x", **first}, {"id": "x", **first}, {"id": "y", **first})
    )
    assert [prompt.id for prompt in named] == ["x"]
    with pytest.raises(PromptError, match="line 1 and line 3 have the same id 'x'"):
        read_prompts(_write(tmp_path / "rows.jsonl", {"id": "x", **first}, {"id": "x", **first}, {"id": "x", **third}))


def test_files_that_are_not_what_they_seem(tmp_path):
    with pytest.raises(PromptError, match=r"No prompt file .*nowhere"):
        read_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "a"}\n\xff\xfe')
    with pytest.raises(PromptError, match=r"bytes\.jsonl after line \d cannot be read as text"):
        read_prompts(tmp_path / "bytes.jsonl")
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(PromptError, match="not a readable parquet file"):
        read_prompts(tmp_path / "x.parquet")
    with pytest.raises(PromptError, match="a raw prompt is one text"):
        read_prompts(_write(tmp_path / "raw.jsonl", {"prompt": "a"}), is_raw=True, system_prompt="S")


def test_gsm8k_reads_whole():
    path = DATA / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}: set OMNIOPD_DATA to a folder that holds gsm8k/train.jsonl")
    rows = read_prompts(path)
    assert len(rows) == 7473
    assert rows[0].id == "train:0"
    assert rows[0].messages[0].content.startswith("Natalia sold clips")
    assert rows[0].answer.endswith("#### 72")


def _stream(prompts, tokenizer, **changes) -> PromptStream:
    settings = dict(batch_size=6, samples_per_prompt=2, max_prompt_tokens=100, seed=5)
    return PromptStream(prompts, tokenizer, **(settings | changes))


def test_a_batch_is_a_function_of_the_step(prompts, tokenizer):
    one, other = _stream(prompts, tokenizer), _stream(prompts, tokenizer)
    forward = [one.batch_for_step(step) for step in range(12)]
    for step in reversed(range(12)):
        batch = other.batch_for_step(step)
        assert batch.prompts == forward[step].prompts
        for name in ("tokens_BxP", "mask_BxP", "sample_index_B"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(forward[step], name))


def test_every_prompt_once_an_epoch_in_a_fresh_order(prompts, tokenizer):
    stream = _stream(prompts, tokenizer)
    ids = [p.id for step in range(26) for p in stream.batch_for_step(step).prompts[::2]]  # 78 = 6 epochs of 13
    epochs = [ids[i : i + 13] for i in range(0, 78, 13)]
    assert all(Counter(epoch) == Counter(p.id for p in prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert stream.epoch(13) == 3.0
    other = _stream(prompts, tokenizer, seed=6)
    assert other.batch_for_step(0).prompts != stream.batch_for_step(0).prompts
    plain = _stream(prompts, tokenizer, shuffle=False)
    assert [p.id for p in plain.batch_for_step(0).prompts] == ["p0", "p0", "p1", "p1", "p2", "p2"]


def test_rows_are_left_padded_prompts_with_their_own_numbers(prompts, tokenizer):
    batch = _stream(prompts, tokenizer).batch_for_step(3)
    assert batch.sample_index_B.tolist() == [18, 19, 20, 21, 22, 23]
    for row, prompt in enumerate(batch.prompts):
        ids = tokenizer.encode_prompt(prompt)
        assert batch.tokens_BxP[row, batch.mask_BxP[row]].tolist() == ids
        assert batch.mask_BxP[row].tolist() == [False] * (batch.tokens_BxP.shape[1] - len(ids)) + [True] * len(ids)


def test_hosts_share_a_batch(prompts, tokenizer):
    whole = _stream(prompts, tokenizer).batch_for_step(4)
    shares = [_stream(prompts, tokenizer, process_index=i, process_count=3).batch_for_step(4) for i in range(3)]
    assert sum((share.prompts for share in shares), ()) == whole.prompts
    np.testing.assert_array_equal(np.concatenate([share.tokens_BxP for share in shares]), whole.tokens_BxP)
    np.testing.assert_array_equal(np.concatenate([share.sample_index_B for share in shares]), whole.sample_index_B)


def test_prompts_that_are_too_long_are_named_and_left_out(prompts, tokenizer):
    lengths = {prompt.id: len(tokenizer.encode_prompt(prompt)) for prompt in prompts}
    limit = sorted(lengths.values())[7]
    stream = _stream(prompts, tokenizer, max_prompt_tokens=limit)
    assert dict(stream.too_long) == {name: length for name, length in lengths.items() if length > limit}
    assert len(stream) + len(stream.too_long) == len(prompts)
    seen = {p.id for step in range(20) for p in stream.batch_for_step(step).prompts}
    assert not seen & set(dict(stream.too_long))
    with pytest.raises(PromptError, match="All 13 prompts are longer than max_prompt_tokens=3"):
        _stream(prompts, tokenizer, max_prompt_tokens=3)


def test_nothing_is_cut_and_sizes_must_divide(prompts, tokenizer):
    with pytest.raises(ValueError, match="5 tokens does not fit a width of 4"):
        pad_prompts(prompts[:1], [[1] * 5], [0], width=4, pad_id=0)
    with pytest.raises(ValueError, match="multiple"):
        _stream(prompts, tokenizer, batch_size=7)
    empty = Prompt("blank", (Message("user", ""),), is_raw=True)
    with pytest.raises(PromptError, match="'blank' has no tokens"):
        _stream([empty], tokenizer)


def test_few_widths_hold_every_length():
    widths = {bucket_width(length) for length in range(1, 8193)}
    assert len(widths) == 18
    assert all(length <= bucket_width(length) < max(2 * length, 17) for length in range(1, 8193))
