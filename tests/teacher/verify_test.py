"""Laws of the loop from anchors to verdicts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from omniopd_jax.data import load_tokenizer
from omniopd_jax.similarity import get_similarity
from omniopd_jax.teacher.protocol import Continuation, ContinuationResult, TeacherStopped
from omniopd_jax.teacher.scripted import NOISE, ScriptedTeacher, scripted_teacher
from omniopd_jax.teacher.verify import END_MARK, VerifySettings, verify
from omniopd_jax.types import Anchors, Branches, Message, Prompt, PromptBatch, Rollout
from omniopd_jax.worlds import arithmetic
from tests.tiny_tokenizers import MULTILINGUAL, save_byte_level, save_sentencepiece_like

C, N = 5, 3
SETTINGS = VerifySettings(chunk_tokens=C, num_continuations=N, token_slack=2.0)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    return load_tokenizer(save_sentencepiece_like(tmp_path_factory.mktemp("spaced")))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    arithmetic.save_tokenizer(str(folder))
    return load_tokenizer(folder)


def _run(tokenizer, responses, starts, script, *, branches=None, settings=SETTINGS, similarity="edit", **changes):
    """Verifies token lists; `script` is a rule, or a teacher."""
    batch, width, slots = len(responses), max(map(len, responses)), max(map(len, starts))
    tokens_BxT = np.zeros((batch, width), np.int32)
    mask_BxT = np.zeros((batch, width), bool)
    start_BxM = np.zeros((batch, slots), np.int32)
    is_valid_BxM = np.zeros((batch, slots), bool)
    for row, ids in enumerate(responses):
        tokens_BxT[row, : len(ids)], mask_BxT[row, : len(ids)] = ids, True
        start_BxM[row, : len(starts[row])], is_valid_BxM[row, : len(starts[row])] = starts[row], True
    prompts = tuple(Prompt(f"p{row}", (Message("user", f"question {row}"),)) for row in range(batch))
    prompt = np.zeros((batch, 1), np.int32)
    arguments = dict(
        tokenizer=tokenizer,
        teacher=ScriptedTeacher(script) if callable(script) else script,
        similarity=get_similarity(similarity) if isinstance(similarity, str) else similarity,
        settings=settings,
        seed=0,
        step=4,
    )
    return verify(
        PromptBatch(prompts, prompt, prompt > 0, np.arange(batch, dtype=np.int32)),
        Rollout(
            prompt, prompt > 0, tokens_BxT, mask_BxT,
            logprob_BxT=np.where(mask_BxT, -0.5, 0.0).astype(np.float32),
            is_finished_B=np.ones(batch, bool),
            entropy_BxT=np.where(mask_BxT, np.arange(width) / 10, 0.0).astype(np.float32),
        ),
        Anchors(start_BxM, is_valid_BxM),
        branches,
        **(arguments | changes),
    )  # fmt: skip


def _echo(tokenizer, responses):
    """A rule that knows the responses and goes on exactly as they do, as far as it is allowed to."""
    whole = [tokenizer.decode(ids) for ids in responses]

    def script(request):
        row = int(request.messages[-1].content.split()[-1])
        assert whole[row].startswith(request.prefix)
        rest = whole[row][len(request.prefix) :]
        allowed = tokenizer.encode(rest)[: request.max_tokens]
        is_cut = len(allowed) < len(tokenizer.encode(rest))
        text = tokenizer.decode_after(tokenizer.encode(request.prefix), allowed) if is_cut else rest
        return [Continuation(text, "length" if is_cut else "stop")] * request.n

    return script


def _response(tokenizer, text):
    return [*tokenizer.encode(text), tokenizer.stop_tokens[0]]


TEXTS = {
    "byte_level": list(MULTILINGUAL),
    "spaced": ["hello all he said x + 1 = 2 here", "x = 46. hello hello all x"],
    "words": ["add 8 and 6 with 0 gives 1 4 ; answer 7 3 4", "7 plus 5 plus 1 makes 1 3 ; answer 1 3"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_teacher_that_always_agrees_scores_one_everywhere(name, request):
    tokenizer = request.getfixturevalue(name)
    responses = [_response(tokenizer, text) for text in TEXTS[name]]
    starts = [list(range(0, len(ids) - C + 1, C)) for ids in responses]  # moved cuts and final chunks included
    starts = [[*row[:-1], len(ids) - C] for row, ids in zip(starts, responses, strict=True)]
    verdicts, audits, metrics = _run(tokenizer, responses, starts, _echo(tokenizer, responses))
    is_valid_BxM = np.array([[slot < len(row) for slot in range(max(map(len, starts)))] for row in starts])
    np.testing.assert_array_equal(verdicts.count_BxM, N * is_valid_BxM)
    np.testing.assert_array_equal(verdicts.score_BxMxN, np.repeat(is_valid_BxM[..., None], N, 2).astype(np.float32))
    np.testing.assert_array_equal(verdicts.agreement_BxM, is_valid_BxM.astype(np.float32))
    assert len(audits) == is_valid_BxM.sum() == metrics["audit/chunks"]
    assert metrics["audit/score_mean"] == 1.0
    assert metrics["audit/identical_share"] == 1.0
    assert metrics["audit/short_share"] == 0.0
    assert (metrics["audit/moved_cuts"] > 0) == (name == "byte_level")
    assert metrics["audit/dropped_cuts"] == 0
    assert [a["is_end"] for a in audits if a["start"] == starts[a["response"]][-1]] == [True] * len(responses)


def test_prefixes_are_clean_ascending_and_never_hold_the_chunk(byte_level):
    responses = [_response(byte_level, text) for text in MULTILINGUAL]
    starts = [sorted({7, 13, 21, len(ids) - C}) for ids in responses]
    seen = []

    def script(request):
        seen.append(request)
        return []

    settings = VerifySettings(chunk_tokens=C, num_continuations=N, token_slack=1.5, max_missing_fraction=1.0)
    _, audits, metrics = _run(byte_level, responses, starts, script, settings=settings)
    assert len(seen) == sum(map(len, starts))
    place = 0
    for row, ids in enumerate(responses):
        for start in starts[row]:
            request, audit = seen[place], audits[place]
            assert request.messages[0].content == f"question {row}"
            assert "\ufffd" not in request.prefix
            assert MULTILINGUAL[row].startswith(request.prefix)
            assert request.prefix == byte_level.decode(ids[: start - audit["moved"]])
            assert request.max_tokens == int(np.ceil((C + audit["moved"]) * 1.5))
            place += 1
    assert metrics["audit/moved_cuts"] == sum(audit["moved"] > 0 for audit in audits) > 0
    assert len({request.seed for request in seen}) == len(seen)
    again = list(seen)
    seen.clear()
    _run(byte_level, responses, starts, script, settings=settings)
    assert seen == again


def test_a_start_without_a_clean_cut_is_dropped_and_counted(byte_level):
    stray = next(i for i in range(byte_level.vocab_size) if byte_level.decode([i]) == "\ufffd")
    response = [*byte_level.encode("all is well here"), stray, *byte_level.encode(" and then it goes on and on")]
    late = len(response) - C
    verdicts, audits, metrics = _run(
        byte_level, [response], [[1, late]], lambda request: [Continuation("x", "length")] * request.n
    )
    assert verdicts.count_BxM.tolist() == [[N, 0]]
    assert metrics["audit/dropped_cuts"] == 1
    assert [audit["start"] for audit in audits] == [1]


def test_missing_samples_lower_n_and_nothing_else(words):
    responses = [_response(words, text) for text in TEXTS["words"]]
    agree = _echo(words, responses)
    starts = [[0, 5], [0, 5]]
    fates = iter([N, 1, 0, 2])

    def script(request):
        return agree(request)[: next(fates)]

    verdicts, audits, metrics = _run(words, responses, starts, script)
    np.testing.assert_array_equal(verdicts.count_BxM, [[N, 1], [0, 2]])
    np.testing.assert_array_equal(verdicts.score_sum_BxM, verdicts.count_BxM)  # what came agrees; what is lost is not 0
    np.testing.assert_array_equal(verdicts.agreement_BxM, [[1, 0], [0, 1]])
    assert metrics["teacher/missing_share"] == pytest.approx(6 / 12)
    assert [(a["count"], a["requested"]) for a in audits] == [(3, 3), (1, 3), (0, 3), (2, 3)]


def test_an_empty_text_counts_only_where_the_teacher_stopped(words):
    response = _response(words, TEXTS["words"][0])
    answers = [Continuation("", "length"), Continuation("", "stop"), Continuation(" 8", "length")]
    verdicts, audits, _ = _run(words, [response], [[0]], lambda request: answers)
    assert verdicts.count_BxM.tolist() == [[2]]
    assert [c["finish_reason"] for c in audits[0]["continuations"]] == ["stop", "length"]


def test_ends_compare_fairly(words):
    response = _response(words, "answer 7 3 4")  # the chunk of 5 tokens holds the stop token
    answers = [
        Continuation(" answer 7 3 4", "stop"),  # ends where the student ends
        Continuation(" answer 7 3 4", "length"),  # does not end
        Continuation(" answer 7 3 4 5", "stop"),  # its stop token would be the sixth
    ]
    verdicts, audits, metrics = _run(words, [response], [[0]], lambda request: answers, similarity="edit_words")
    np.testing.assert_allclose(verdicts.score_BxMxN[0, 0], [1.0, 4 / 5, 4 / 5], atol=1e-6)
    assert metrics["audit/ended_share"] == pytest.approx(1 / 3)
    assert metrics["audit/short_share"] == pytest.approx(1 / 3)
    assert audits[0]["is_end"]
    assert END_MARK not in json.dumps(audits)
    # Neither side ends inside the chunk: no mark.
    unended = [*response[:-1], 3, 3]
    verdicts, _, _ = _run(words, [unended], [[0]], lambda request: answers[2:] * N, similarity="edit_words")
    np.testing.assert_allclose(verdicts.score_BxMxN[0, 0], 4 / 5, atol=1e-6)


@pytest.mark.parametrize("name", ["byte_level", "spaced"])
def test_continuations_are_cut_to_the_students_tokens_and_white_space_is_aligned(name, request):
    tokenizer = request.getfixturevalue(name)
    response = tokenizer.encode("hello x he all hello all")
    start = 3
    chunk = tokenizer.decode_after(response[:start], response[start : start + C])
    long = tokenizer.decode_after(response[:start], response[start:])
    answers = [Continuation(text, "length") for text in (long, long.lstrip(), "\n " + long.lstrip())]
    verdicts, audits, _ = _run(tokenizer, [response], [[start]], lambda request: answers)
    assert verdicts.score_BxMxN[0, 0, 0] == 1.0
    for continuation in audits[0]["continuations"]:
        assert len(tokenizer.encode(continuation["text"])) <= C
        a, b = continuation["text"].lstrip(), chunk.lstrip()
        assert a.startswith(b) or b.startswith(a)  # the white space decides at most where the cut falls


def test_branches_are_scored_against_the_same_texts(words):
    response = _response(words, TEXTS["words"][0])
    own = words.encode("with 0 gives 1 4")
    texts = ["with 0 gives 1 4", "with 0 gives 1 4", "answer 7 3 4", "with 1 gives 1 5"]
    branches_GxC = np.zeros((4, C), np.int32)
    mask_GxC = np.zeros((4, C), bool)
    for g, text in enumerate(texts):
        ids = words.encode(text)
        ids = ids if len(ids) == C else [*ids, words.stop_tokens[0]]
        branches_GxC[g], mask_GxC[g] = ids, True
    branches = Branches(branches_GxC[None, None], mask_GxC[None, None], np.zeros((1, 1, 4, C), np.float32))
    answers = [" with 0 gives 1 4", " with 1 gives 1 5 ;", " answer 7 3 4"]
    finish = ["length", "length", "stop"]
    assert response[4:9] == own
    found = [Continuation(text, reason) for text, reason in zip(answers, finish, strict=True)]
    verdicts, audits, metrics = _run(words, [response], [[4]], lambda request: found, branches=branches)
    similarity = get_similarity("edit")
    ended = [False, False, True, False]
    compared = [text + END_MARK * end for text, end in zip(texts, ended, strict=True)]
    teacher = ["with 0 gives 1 4", "with 1 gives 1 5", "answer 7 3 4" + END_MARK]
    expected = [np.mean(similarity([a] * 3, teacher)) for a in compared]
    np.testing.assert_allclose(verdicts.branch_score_BxMxG[0, 0], expected, atol=1e-6)
    overlap = [
        np.mean([similarity([a], [b])[0] for j, b in enumerate(compared) if j != i]) for i, a in enumerate(compared)
    ]
    np.testing.assert_allclose(verdicts.branch_overlap_BxMxG[0, 0], overlap, atol=1e-6)
    agreement = np.mean([similarity([teacher[i]], [teacher[j]])[0] for i, j in [(0, 1), (0, 2), (1, 2)]])
    np.testing.assert_allclose(verdicts.agreement_BxM[0, 0], agreement, atol=1e-6)
    assert [branch["text"].strip() for branch in audits[0]["branches"]] == texts
    assert metrics["audit/branch_distinct_share"] == 3 / 4
    # The branch that writes the student's own chunk is scored as the chunk is.
    np.testing.assert_allclose(verdicts.branch_score_BxMxG[0, 0, 0], verdicts.score_BxMxN[0, 0].mean(), atol=1e-6)


def test_branches_of_a_moved_cut_begin_where_the_teachers_text_begins(byte_level):
    response = byte_level.encode("so 𝒙² + 𝒚² = 1. and so on")
    start = next(i for i in range(4, len(response)) if not byte_level.is_clean_cut(response, i))
    branch = np.array(response[start : start + C], np.int32)
    branches = Branches(branch[None, None, None].repeat(2, 2), np.ones((1, 1, 2, C), bool), np.zeros((1, 1, 2, C)))
    verdicts, audits, metrics = _run(
        byte_level, [response], [[start]], _echo(byte_level, [response]), branches=branches
    )
    assert metrics["audit/moved_cuts"] == 1
    np.testing.assert_array_equal(verdicts.branch_score_BxMxG, 1.0)
    np.testing.assert_array_equal(verdicts.branch_overlap_BxMxG, 1.0)
    assert audits[0]["branches"][0]["text"] == audits[0]["chunk"]


def test_equal_pairs_are_compared_once(words):
    response = _response(words, TEXTS["words"][0])
    seen = []

    def similarity(a, b):
        seen.append(list(zip(a, b, strict=True)))
        return get_similarity("edit")(a, b)

    verdicts, _, _ = _run(words, [response], [[0, 5]], scripted_teacher("noise"), similarity=similarity)
    assert len(seen) == 1
    assert len(seen[0]) == len(set(seen[0])) == 2  # six pairs, two distinct
    assert (verdicts.score_BxMxN < 0.5).all()


def test_audits_can_be_written_and_say_what_was_compared(words):
    responses = [_response(words, TEXTS["words"][0])] * 2
    _, audits, _ = _run(words, responses, [[], [5]], scripted_teacher("noise"))
    (audit,) = json.loads(json.dumps(audits))
    assert audit["step"] == 4
    assert audit["response"] == 1
    assert audit["prompt_id"] == "p1"
    assert (audit["slot"], audit["start"], audit["moved"], audit["num_tokens"]) == (0, 5, 0, C)
    assert audit["chunk"] == " 0 gives 1 4 ;"
    assert audit["entropy"] == pytest.approx(0.5)
    assert audit["logprob"] == pytest.approx(-0.5 * C)
    assert len(audit["continuations"]) == audit["count"] == audit["requested"] == N
    assert audit["score_sum"] == pytest.approx(sum(c["score"] for c in audit["continuations"]), abs=1e-3)
    assert audit["prior"] is audit["target"] is audit["weight"] is None


def test_nothing_is_asked_where_nothing_can_be_audited(words):
    def script(request):
        raise AssertionError("no request was to be sent")

    verdicts, audits, metrics = _run(words, [_response(words, "answer 7")], [[]], script)
    assert verdicts.count_BxM.shape == (1, 0)
    assert audits == []
    assert metrics["audit/chunks"] == metrics["teacher/calls"] == 0


def test_usage_adds_up(words):
    responses = [_response(words, text) for text in TEXTS["words"]]
    _, _, metrics = _run(words, responses, [[0, 5], [5]], scripted_teacher("noise"))
    assert metrics["teacher/calls"] == 3
    assert metrics["teacher/completion_tokens"] == 3 * N * len(NOISE.split())
    assert metrics["teacher/tokens"] == metrics["teacher/prompt_tokens"] + metrics["teacher/completion_tokens"]
    assert metrics["teacher/received"] == metrics["teacher/requested"] == 9


def _teacher_of(**result):
    return SimpleNamespace(
        name="a teacher", continue_texts=lambda requests: [ContinuationResult((), **result) for _ in requests]
    )


def test_silence_and_refusal_stop_the_run(words):
    response = _response(words, TEXTS["words"][0])
    with pytest.raises(TeacherStopped, match=r"3 of 3 samples of scripted:missing are missing in step 4"):
        _run(words, [response], [[0]], scripted_teacher("missing"))
    with pytest.raises(TeacherStopped, match=r"a teacher refused 3 of 3 samples in step 4.*max_refusal_fraction=0.5"):
        _run(words, [response], [[0]], _teacher_of(num_missing=3, num_refused=3))
    patient = VerifySettings(chunk_tokens=C, num_continuations=N, max_missing_fraction=1.0, max_refusal_fraction=1.0)
    verdicts, _, metrics = _run(words, [response], [[0]], _teacher_of(num_missing=3, num_refused=3), settings=patient)
    assert verdicts.count_BxM.tolist() == [[0]]
    assert metrics["teacher/refused_share"] == metrics["teacher/missing_share"] == 1.0
    lost = SimpleNamespace(name="a teacher", continue_texts=lambda requests: [])
    with pytest.raises(TeacherStopped, match="answered 0 of 1 requests"):
        _run(words, [response], [[0]], lost)


def test_the_teachers_texts_come_in_the_students_tokens(byte_level):
    """From the clean cut on, at most C tokens, a stop token where the teacher ended its answer within them."""
    responses = [_response(byte_level, text) for text in MULTILINGUAL]
    starts = [sorted({7, 13, len(ids) - C}) for ids in responses]
    rest = {}

    def script(request):
        answer = MULTILINGUAL[int(request.messages[0].content.split()[1])]
        text = answer[len(request.prefix) :]
        rest[request.messages[0].content, request.prefix] = text
        return [Continuation(text, "stop"), Continuation(text[:6] or "x", "length"), Continuation("", "stop")]

    verdicts, audits, _ = _run(byte_level, responses, starts, script)
    assert verdicts.text_BxMxNxC.shape == verdicts.text_mask_BxMxNxC.shape == (len(responses), 3, N, C)
    stop = byte_level.stop_tokens[0]
    for audit in audits:
        place, cut = (audit["response"], audit["slot"]), audit["start"] - audit["moved"]
        assert verdicts.cut_BxM[place] == cut
        texts = [
            tokens[mask].tolist()
            for tokens, mask in zip(verdicts.text_BxMxNxC[place], verdicts.text_mask_BxMxNxC[place], strict=True)
        ]
        prefix = byte_level.decode(responses[audit["response"]][:cut])
        whole = byte_level.encode(rest[f"question {audit['response']}", prefix])
        assert texts[0] == ([*whole, stop] if len(whole) < C + audit["moved"] else whole)[:C]
        assert stop not in texts[1]
        assert texts[2] == [stop]
        assert not any(texts[3:])
