"""Laws of text ↔ tokens."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_jax.data import Tokenizer, TokenizerError, load_tokenizer
from omniopd_jax.data.tokenizer import LONGEST_MOVE
from omniopd_jax.types import Message, Prompt
from omniopd_jax.worlds import arithmetic
from tests.tiny_tokenizers import MULTILINGUAL, save_byte_level, save_sentencepiece_like


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def spaced(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece_like(tmp_path_factory.mktemp("spaced")))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    arithmetic.save_tokenizer(str(folder))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["words", "byte_level", "spaced"])
def test_the_running_texts_of_tokens_join_to_their_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = "add 3 and 7 with 1 gives 1 1 ; answer 1 1" if kind == "words" else "he all = 12 x. hello"
    ids = tokenizer.encode(text) + list(tokenizer.stop_tokens)[:1]
    pieces = tokenizer.running_texts(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode_all(ids)
    assert tokenizer.running_texts([]) == []


def test_parts_of_a_character_stay_one_text_each(byte_level):
    ids = byte_level.encode("a算b")
    assert byte_level.running_texts(ids) == byte_level.token_texts(ids)


def _is_sound(ids, tokenizer):
    """Whether the bytes of byte-level tokens are whole characters: the definition, without the decoder."""
    from tokenizers.pre_tokenizers import ByteLevel

    byte_of = {}
    for byte in range(256):  # the printable stand-in of each byte, read off the pre-tokenizer
        if byte < 128:
            byte_of[ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0]] = byte
    stand_ins = sorted(set(ByteLevel.alphabet()), key=ord)
    direct = [c for c in stand_ins if ord(c) < 256]
    moved = [c for c in stand_ins if ord(c) >= 256]
    table = {c: ord(c) for c in direct}
    table |= dict(zip(moved, [b for b in range(256) if b not in set(table.values())], strict=True))
    assert all(table[c] == b for c, b in byte_of.items())
    data = b"".join(bytes(table[c] for c in tokenizer.hf.convert_ids_to_tokens(int(i))) for i in ids)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet=st.one_of(st.sampled_from("".join(MULTILINGUAL)), st.characters(codec="utf-8")), max_size=60),
    share=st.floats(0, 1),
)
def test_a_prefix_never_holds_a_broken_character(byte_level, text, share):
    text = text.replace("\ufffd", "")
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    end = round(share * len(ids))
    cut = byte_level.clean_prefix_length(ids, end)
    sound = [length for length in range(max(end - LONGEST_MOVE, 0), end + 1) if _is_sound(ids[:length], byte_level)]
    assert cut == max(sound, default=None)
    if cut is not None:
        assert text.startswith(byte_level.decode(ids[:cut]))


def test_in_sound_text_a_clean_cut_is_always_near(byte_level):
    for text in MULTILINGUAL:
        ids = byte_level.encode(text)
        cuts = [byte_level.clean_prefix_length(ids, end) for end in range(len(ids) + 1)]
        assert None not in cuts
        assert any(cut < end for end, cut in enumerate(cuts)) or text.isascii() or text == MULTILINGUAL[1]


def test_bytes_that_are_no_character_leave_no_clean_cut_behind_them(byte_level):
    rng = random.Random(0)
    stray = next(i for i in range(byte_level.vocab_size) if byte_level.decode([i]) == "\ufffd")
    ids = byte_level.encode("so far so good ")
    broken = [*ids, stray, *byte_level.encode("and on it goes for a long while")]
    assert byte_level.clean_prefix_length(broken, len(ids)) == len(ids)
    assert byte_level.clean_prefix_length(broken, len(ids) + 1) == len(ids)
    assert byte_level.clean_prefix_length(broken, len(broken)) is None
    for _ in range(50):  # random tokens, as an untrained student writes them
        noise = [rng.randrange(byte_level.vocab_size) for _ in range(30)]
        cut = byte_level.clean_prefix_length(noise, rng.randrange(31))
        assert cut is None or "\ufffd" not in byte_level.decode(noise[:cut])


@pytest.mark.parametrize("name", ["byte_level", "spaced", "words"])
def test_spans_decoded_in_context_add_up_to_the_whole(name, request):
    tokenizer = request.getfixturevalue(name)
    texts = {
        "byte_level": "  two spaces,\n\tThe answer: 46 🙂 素早い",
        "spaced": "hello  all he said x é 🙂",
        "words": "add 8 and 6 with 0 gives 1 4",
    }
    text = texts[name]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    cuts = [end for end in range(len(ids) + 1) if tokenizer.is_clean_cut(ids, end)]
    assert len(cuts) > 6
    pieces = [tokenizer.decode_after(ids[:a], ids[a:b]) for a, b in itertools.pairwise(cuts)]
    assert tokenizer.decode(ids[: cuts[0]]) + "".join(pieces) == whole
    assert whole.strip() == text.strip()


def test_a_long_context_of_special_tokens_decodes_as_in_place(spaced):
    ids = [*spaced.encode("hello"), *[1] * 20, *spaced.encode(" all")]
    context = len(ids) - len(spaced.encode(" all"))
    assert spaced.decode_after(ids[:context], ids[context:]) == " all"


def test_text_that_goes_on_is_encoded_without_a_space_of_the_tokenizers_own(spaced):
    assert spaced.hf.backend_tokenizer.encode("he", add_special_tokens=False).tokens == ["▁he"]
    ids = spaced.encode("he")
    assert spaced.hf.convert_ids_to_tokens(ids) == ["he"]
    assert spaced.decode_after(spaced.encode("x"), ids) == "he"
    assert spaced.decode_after(spaced.encode("x"), spaced.encode(" he")) == " he"


def test_a_special_token_in_a_text_of_others_stays_text(byte_level):
    text = "it wrote <|im_end|> and went on"
    ids = byte_level.encode(text)
    assert not set(ids) & byte_level.special_tokens
    assert byte_level.decode(ids) == text
    raw = byte_level.encode_prompt(Prompt("a", (Message("user", text),), is_raw=True))
    assert byte_level.stop_tokens[0] in raw  # the user's own raw text means what it says


def test_lone_surrogates_do_not_stop_a_run(byte_level):
    assert byte_level.decode(byte_level.encode("a\ud800b")) == "a?b"


def test_chat_template_and_its_arguments(byte_level):
    prompt = Prompt("a", (Message("system", "Be brief."), Message("user", "1+1?")))
    text = byte_level.render(prompt, {"enable_thinking": False})
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n"
    )
    assert byte_level.hf.decode(byte_level.encode_prompt(prompt, {"enable_thinking": False})) == text
    assert byte_level.render(prompt).endswith("assistant\n")


def test_raw_text_gets_the_start_token_and_no_end(spaced):
    prompt = Prompt("a", (Message("user", "hello"),), is_raw=True)
    assert spaced.encode_prompt(prompt)[0] == 1
    assert spaced.stop_tokens[0] not in spaced.encode_prompt(prompt)
    with pytest.raises(TokenizerError, match="no chat template"):
        spaced.encode_prompt(Prompt("a", (Message("user", "hello"),)))
    with pytest.raises(TokenizerError, match="2 messages"):
        spaced.render(Prompt("a", (Message("system", "x"), Message("user", "y"))), use_chat_template=False)


def test_stop_tokens_come_from_all_three_places(tmp_path):
    save_byte_level(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_tokens == (0, 2, 7, 9)
    assert tokenizer.pad_id == 0  # shared with a stop token
    banned = tokenizer.banned_tokens(tokenizer.vocab_size + 3)
    assert not set(banned) & set(tokenizer.stop_tokens)
    assert set(banned) == {1, tokenizer.vocab_size, tokenizer.vocab_size + 1, tokenizer.vocab_size + 2}


def test_banned_tokens_of_a_world(words):
    names = [words.hf.convert_ids_to_tokens(token) for token in words.banned_tokens(words.vocab_size)]
    assert names == ["<pad>", "<unk>"]
    assert [words.hf.convert_ids_to_tokens(token) for token in words.stop_tokens] == ["<eos>"]


def test_a_tokenizer_survives_saving(byte_level, tmp_path):
    byte_level.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in MULTILINGUAL:
        assert again.encode(text) == byte_level.encode(text)
    assert again.stop_tokens == byte_level.stop_tokens


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"No folder .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"No tokenizer in .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    save_sentencepiece_like(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TokenizerError, match="JSON"):
        load_tokenizer(tmp_path)
