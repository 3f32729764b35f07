"""Our own contestants on the smallest shapes: each does its work, says how much it did and compiles once."""

import pytest

from omniopd_jax.bench import generation, products, scoring, shapes, texts

TINY = dict(model="tiny", dtype="float32", batch=2, prompt_tokens=4, new_tokens=8)


def _run_twice(work):
    first = work.run()
    compiled = work.counter() if work.counter else 0
    again = work.run()
    assert not work.counter or work.counter() == compiled, "compiled anew after the warm-up"
    assert dict(first or {}).get("tokens") == dict(again or {}).get("tokens")
    return dict(again or {})


def test_rollout():
    _run_twice(generation.rollout(dict(TINY, new_tokens=24)))


@pytest.mark.slow
def test_refilled_slots_draw_what_batches_draw():
    spec = dict(TINY, batch=8, new_tokens=40, slots=4, lengths="logarithmic")
    lengths = [_run_twice(generation.refill(dict(spec, kind=kind))) for kind in ("refill", "at once")]
    assert lengths[0]["tokens"] == lengths[1]["tokens"]
    assert lengths[0]["shortest"] < lengths[0]["longest"] <= 40


@pytest.mark.parametrize("kind", ["branches", "prefixes"])
def test_audit(kind):
    spec = dict(TINY, response_tokens=32, chunks=2, continuations=3, chunk_tokens=4, kind=kind)
    assert _run_twice(generation.audit(spec))["tokens"] == 24


def test_both_sources_of_entropy_choose_the_same_chunks_in_float32():
    said = _run_twice(generation.anchors(dict(TINY, new_tokens=24, chunks=2, chunk_tokens=4)))
    assert said["same_responses"] == said["same_chunks"] == 1


def test_score():
    _run_twice(scoring.score(dict(TINY, width=16, vocabulary=64, kind="dense")))


def test_products_are_those_of_an_update():
    decoder = shapes.read_shape("tiny")
    listed = products.of_update(decoder, 6, 5)
    weights = sum(inputs * outputs * count for _, inputs, outputs, count, _ in listed)
    assert weights == shapes.layer_weights(decoder) + shapes.head_weights(decoder)
    forward = 2.0 * (6 * shapes.layer_weights(decoder) + 5 * shapes.head_weights(decoder))
    assert shapes.products_cost(listed).flops == 4 * forward
    _run_twice(products.products(dict(dtype="float32", products=listed)))


def test_similarity():
    said = _run_twice(
        texts.similarity(dict(batch=1, chunks=2, continuations=2, chunk_tokens=5, name="edit", kind="pairs"))
    )
    assert said["tokens"] == 20
