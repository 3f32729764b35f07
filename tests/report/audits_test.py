"""The audit viewer's pieces: nothing lost, nothing twice, nothing too large."""

import base64
import gzip
import json

import pytest

from omniopd_jax.report import audits
from omniopd_jax.report.workdir import read_workdir
from tests.report import synthetic


def unpack(piece):
    return json.loads(gzip.decompress(base64.b64decode(piece)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_workdir(synthetic.write_run(tmp_path_factory.mktemp("run"), steps=90, responses=4, arm="branch"))


def test_the_index_finds_every_response_and_every_audit(run, monkeypatch):
    monkeypatch.setattr(audits, "PIECE_CHARACTERS", 50_000)
    packed = audits.read_audits(run)
    index, *pieces = map(unpack, packed.pieces)
    assert len(pieces) > 10
    columns, seen = index["columns"], set()
    for i in range(packed.num_responses):
        entry = pieces[columns["piece"][i] - 1][columns["place"][i]]
        assert (entry["step"], entry["row"]) == (columns["step"][i], columns["row"][i])
        assert entry["prompt_id"] == index["prompts"][columns["prompt"][i]]["id"]
        assert len(entry["audits"]) == columns["chunks"][i]
        seen |= {(entry["step"], entry["row"], audit["slot"]) for audit in entry["audits"]}
    lines = [json.loads(line) for line in (run.path / "audits.jsonl").read_text().splitlines()]
    assert seen == {(line["step"], line["response"], line["slot"]) for line in lines}
    assert packed.num_audits == len(lines)
    assert packed.remark == ""


def test_an_audit_keeps_its_figures_and_texts(run):
    entry = unpack(audits.read_audits(run).pieces[1])[0]
    line = json.loads((run.path / "audits.jsonl").read_text().splitlines()[0])
    audit = entry["audits"][0]
    for name in (
        "start",
        "num_tokens",
        "entropy",
        "prior",
        "score_sum",
        "count",
        "target",
        "weight",
        "logprob",
        "chunk",
    ):
        assert audit[name] == pytest.approx(line[name]) if isinstance(line[name], float) else audit[name] == line[name]
    assert [each["text"] for each in audit["continuations"]] == [each["text"] for each in line["continuations"]]
    assert [each["weight"] for each in audit["branches"]] == [each["weight"] for each in line["branches"]]


def test_figures_without_a_place_of_their_own_are_kept_by_name(tmp_path):
    (tmp_path / "audits.jsonl").write_text(
        json.dumps({"step": 1, "response": 0, "prompt_id": "p", "slot": 0, "agreement": 0.5, "note": "x"}) + "\n"
    )
    entry = unpack(audits.read_audits(read_workdir(tmp_path)).pieces[1])[0]
    assert entry["audits"][0]["others"] == {"agreement": 0.5, "note": "x"}


def test_the_same_words_for_the_same_prompt_find_each_other(tmp_path):
    def line(step, chunk, prompt="p"):
        return {"step": step, "response": 0, "prompt_id": prompt, "slot": 0, "chunk": chunk, "logprob": -step}

    lines = [line(1, "same"), line(2, "other"), line(3, "same"), line(4, "same", prompt="q")]
    (tmp_path / "audits.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    entries = unpack(audits.read_audits(read_workdir(tmp_path)).pieces[1])
    assert [entry["audits"][0]["repeats"] for entry in entries] == [[[1, -1], [3, -3]], [], [[1, -1], [3, -3]], []]


def test_a_page_that_would_be_too_large_leaves_out_whole_steps_and_says_so(run):
    size = sum((run.path / name).stat().st_size for name in ("rollouts.jsonl", "audits.jsonl"))
    packed = audits.read_audits(run, max_bytes=size // 3)
    steps = set(unpack(packed.pieces[0])["columns"]["step"])
    assert len(steps) == 30
    assert {1, 90} <= steps
    assert packed.remark.startswith("The responses of 30 of the 90 logged steps")


def test_megabyte_texts_are_clipped_with_a_count(tmp_path):
    synthetic.write_run(tmp_path, steps=3, responses=2, hostile=True)
    packed = audits.read_audits(read_workdir(tmp_path))
    entry = unpack(packed.pieces[1])[0]
    assert entry["audits"][0]["chunk"] == {"text": "M" * audits.MAX_CHUNK, "more": 2**20 - audits.MAX_CHUNK}
    assert entry["audits"][0]["target"] is None
    assert entry["audits"][0]["branches"] == []
    assert entry["entropy"][:3] == [None, None, None]
    assert sum(map(len, packed.pieces)) < 100_000


def test_a_run_without_responses_has_no_pieces(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a/b": 1}\n')
    assert audits.read_audits(read_workdir(tmp_path)).pieces == []
