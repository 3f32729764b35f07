"""Each silent error that can be seen before the first step is seen."""

import json
import re

import pytest

from omniopd_jax.data import PromptStream, load_tokenizer
from omniopd_jax.data.preflight import Side, preflight, raise_errors, table
from omniopd_jax.types import InputError, Message, Prompt
from omniopd_jax.worlds import arithmetic
from tests.tiny_tokenizers import CHATML, save_byte_level

ARGS = {"enable_thinking": False}
PROMPTS = [Prompt(f"p{i}", (Message("user", "word " * (1 + 9 * i) + "?"),)) for i in range(4)]


def _tokenizer(folder, *, template=None, **configs):
    folder.mkdir(exist_ok=True)
    save_byte_level(folder, vocab_size=300)
    for name, values in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def _findings(student, teacher=None, /, *, limit=1000, prompts=PROMPTS, **sizes):
    stream = PromptStream(
        prompts, student, batch_size=2, max_prompt_tokens=limit, seed=0, template_args=ARGS,
        use_chat_template=not prompts[0].is_raw,
    )  # fmt: skip
    sides = [
        None
        if tokenizer is None
        else Side(tokenizer, sizes.get(name, tokenizer.vocab_size), sizes.get(f"{name}_size", 0))
        for name, tokenizer in (("student", student), ("teacher", teacher))
    ]
    found = preflight(*sides, stream, max_prompt_tokens=limit, template_args=ARGS,
                      use_chat_template=not prompts[0].is_raw)  # fmt: skip
    return found


def _wrong(findings, level="warning"):
    return [f"{finding.name}: {finding.text}" for finding in findings if finding.level == level]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    # A template whose finished turns carry the same empty thoughts as its generation prompt.
    template = CHATML.replace(
        "{{ '<|im_start|>' + message.role + '\\n' +",
        "{{ '<|im_start|>' + message.role + '\\n' + "
        "('<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' else '') +",
    )
    return _tokenizer(tmp_path_factory.mktemp("sound"), template=template)


def test_a_sound_pair_has_no_findings(sound):
    findings = _findings(sound, sound, student=sound.vocab_size + 6, student_size=10, teacher_size=20)
    assert {finding.level for finding in findings} == {"ok"}
    raise_errors(findings)
    lines = table(findings).splitlines()
    assert len(lines) == len(findings) == 9
    assert "ok       student stop tokens  <|im_end|> (2)" in lines
    assert any("6 rows of the model stand for none" in line for line in lines)
    assert "the teacher can end as the student does: <|im_end|>." in table(findings)


def test_a_world_has_no_findings(tmp_path):
    arithmetic.save_tokenizer(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    prompts = [arithmetic.Problem(478, 256, 3).prompt("a")]
    assert {finding.level for finding in _findings(tokenizer, tokenizer, prompts=prompts)} == {"ok"}
    unknown = [Prompt("b", (Message("user", "4 7 x + 2"),))]
    assert _wrong(_findings(tokenizer, prompts=unknown)) == [
        "student template: prompt 'b' does not come back as it went in: 'x' became '<unk>'."
    ]


def test_raw_texts_are_looked_at_without_a_template(sound):
    findings = _findings(sound, prompts=[Prompt("a", (Message("user", "1 + 1 ="),), is_raw=True)])
    assert [f.text for f in findings if f.name == "student raw text"] == ["prompt 'a' comes back as it went in."]
    assert not _wrong(findings)


def test_prompts_that_are_too_long_are_counted_and_named(sound):
    lengths = [len(sound.encode_prompt(prompt, ARGS)) for prompt in PROMPTS]
    (warning,) = _wrong(_findings(sound, limit=lengths[1]))
    assert warning == (
        f"prompts: 2 of 4 prompts have more than data.max_prompt_tokens={lengths[1]} tokens and are left out: "
        f"p2 ({lengths[2]}), p3 ({lengths[3]})."
    )


def test_a_tokenizer_of_another_model_is_an_error(sound):
    findings = _findings(sound, sound, teacher=50)
    (error,) = _wrong(findings, "error")
    assert error.startswith("teacher vocabulary: the tokenizer has ids up to")
    assert table(findings).splitlines()[0].startswith("error")
    with pytest.raises(InputError, match="they do not belong together"):
        raise_errors(findings)


def test_stop_tokens_beyond_the_vocabulary_are_an_error(tmp_path):
    tokenizer = _tokenizer(tmp_path / "a", generation_config={"eos_token_id": [2, 151645]})
    (error,) = _wrong(_findings(tokenizer), "error")
    assert error.startswith("student stop tokens: [151645] are named")


TEMPLATES = {
    "thinking marks in one place only": (CHATML, "an answer begins after.*</think>.*when it is asked for, but after"),
    "an end that stops nothing": (
        "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|endoftext|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
        r"ends an answer with <\|endoftext\|> \(0\), which is no stop token",
    ),
    "answers stripped": (
        "{% for m in messages %}{{ '<|im_start|>' + m.content | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
        "strips white space around an answer",
    ),
    "questions changed": (
        "{% for m in messages %}{{ '<|im_start|>' + (m.content | upper if m.role == 'user' else m.content) }}"
        "{{ '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
        "it changes the text of prompt 'p0'",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_would_train_on_something_else(name, tmp_path):
    template, message = TEMPLATES[name]
    (warning,) = _wrong(_findings(_tokenizer(tmp_path / "a", template=template)))

    assert re.search(message, warning, re.DOTALL), warning


def test_a_teacher_without_a_template_is_an_error(sound, tmp_path):
    teacher = _tokenizer(tmp_path / "a", template="{{ raise_exception('no system turn') }}")
    (error,) = _wrong(_findings(sound, teacher), "error")
    assert "refuses these messages: no system turn" in error


def test_folders_that_may_be_swapped_and_other_ends(sound, tmp_path):
    arithmetic.save_tokenizer(str(tmp_path))
    other = load_tokenizer(tmp_path)
    warnings = _wrong(_findings(sound, other, student_size=30, teacher_size=20))
    assert (
        "sizes: the student has 30 parameters, the teacher 20: are student.path and teacher.path swapped?" in warnings
    )
    assert (
        "ends: the teacher ends with <eos> and never with the student's <|im_end|>; its ends count as the student's."
        in warnings
    )
    assert "re-tokenised" in table(_findings(sound, other))
