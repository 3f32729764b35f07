"""The start-up probe proves a manner of asking or stops with a sentence."""

import json

import pytest

from omniopd_jax.teacher.probe import is_same_model
from omniopd_jax.teacher.protocol import TeacherStopped


def refuse(faults, message, status=400):
    return faults.Answer(status=status, body={"error": {"message": message}})


def test_one_call_proves_a_route_that_takes_n(make, server, tmp_path):
    said = make().probe()  # `make` has probed once already
    assert len(server.log) == 2
    assert "mode completions, up to 64 samples a call" in said
    assert "Two samples differ." in said
    found = json.loads((tmp_path / "teacher_probe.json").read_text())
    assert found["manner"]["mode"] == "completions"
    assert found["answered"] == "m"


@pytest.mark.parametrize(("kind", "calls"), [("anthropic", 2), ("gemini", 1)])
def test_chat_routes_are_proved_in_a_call_or_two(kind, calls, make, server):
    teacher = make(kind)
    assert len(server.log) == calls
    assert teacher._finding.manner.mode == "prefill"


def test_a_server_that_ignores_n_is_asked_one_by_one(make, server, ask, faults):
    server.behave = lambda call: faults.Answer(texts=[f" text {call.number}"])
    teacher = make()
    assert teacher._finding.manner.max_n == 1
    (result,) = teacher.continue_texts([ask(n=5)])
    assert len({found.text for found in result.continuations}) == 5
    assert "one sample a call" in teacher.probe()


def test_what_is_refused_by_name_is_left_out(make, server, faults):
    def behave(call):
        for name in ("n", "seed", "top_p"):
            if name in call.body:
                return refuse(faults, f"Unexpected fields in the request: {{'{name}'}}", 422)
        return faults.Answer()

    server.behave = behave
    teacher = make()
    manner = teacher._finding.manner
    assert (manner.max_n, manner.seed, manner.sampling) == (1, False, "one")
    assert "completions takes no seed" in teacher.probe()


def test_prefill_that_is_refused_leads_to_instruct(make, server, faults, ask):
    def behave(call):
        if call.body["messages"][-1]["role"] == "assistant":
            return refuse(faults, "This model does not support assistant message prefill.")
        return faults.Answer()

    server.behave = behave
    teacher = make("anthropic")
    assert teacher._finding.manner.mode == "instruct"
    assert "prefill is refused" in teacher.probe()
    (result,) = teacher.continue_texts([ask(n=1, is_raw=False)])
    assert len(result.continuations) == 1


def test_sampling_parameters_that_are_refused_are_left_out(make, server, faults):
    server.behave = lambda call: (
        refuse(faults, "`temperature` is deprecated for this model.") if "temperature" in call.body else faults.Answer()
    )
    teacher = make("anthropic")
    assert teacher._finding.manner.sampling == "fixed"
    assert "its sampling is fixed by the provider" in teacher.probe()


def test_a_route_that_repeats_the_prefix_does_not_count_as_prefill(make, server, faults):
    def behave(call):
        last = call.body["messages"][-1]
        text = last["content"] + " and so on" if last["role"] == "assistant" else f" fine {call.number}"
        return faults.Answer(texts=[text] + [f" {i}" for i in range(1, call.n)])

    server.behave = behave
    teacher = make("openai", is_raw=False)  # no tokenizer: completions cannot be rendered
    assert teacher._finding.manner.mode == "instruct"
    said = teacher.probe()
    assert "Mode completions needs the teacher's own chat template" in said
    assert "prefill repeats the prefix" in said


@pytest.mark.parametrize("kind", ["openai", "anthropic", "gemini"])
def test_a_greedy_teacher_is_an_error(kind, make, server, faults):
    server.behave = lambda call: faults.Answer(texts=[" always the same"] * call.n)
    with pytest.raises(TeacherStopped, match="cannot be made to sample"):
        make(kind, is_raw=False)
    assert len(server.log) <= 12


def test_a_greedy_server_that_can_be_told_to_sample_is_told(make, server, faults, ask):
    server.behave = lambda call: faults.Answer(
        texts=[f" {call.number}{i}" if "generation_config" in call.body else " same" for i in range(call.n)]
    )
    teacher = make()
    assert "told to sample" in teacher.probe()
    (result,) = teacher.continue_texts([ask()])
    assert len({found.text for found in result.continuations}) == 3
    assert all(json.loads(entry["call"].body["generation_config"])["do_sample"] for entry in server.calls)


def test_temperature_zero_is_the_users_own_wish(make, server, faults):
    server.behave = lambda call: faults.Answer(texts=[" always the same"] * call.n)
    assert "all continuations of a chunk will be equal" in make(temperature=0.0).probe()


def test_another_model_than_asked_for_is_an_error(make, server, faults, tmp_path):
    server.behave = lambda call: faults.Answer(model="gemini-3.6-flash")
    with pytest.raises(TeacherStopped, match=r"asked for model 'gemini-2.5-flash' and answered as 'gemini-3.6-flash'"):
        make("gemini")
    mine = tmp_path / "mine.json"
    record = {"kind": "gemini", "model": "gemini-2.5*", "modes": ["prefill"], "answers_as": ["gemini-3.6*"]}
    mine.write_text(json.dumps({"records": [record]}))
    assert "answers as gemini-3.6-flash" in make("gemini", capabilities=str(mine)).probe()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_told_at_once(status, make, server, faults):
    server.behave = lambda call: refuse(faults, "invalid api key", status)
    with pytest.raises(TeacherStopped, match=f"does not answer: HTTP {status}: invalid api key"):
        make("anthropic")
    assert len(server.log) == 1


def test_a_server_that_knows_no_route_is_told(make, server, faults):
    server.behave = lambda call: refuse(faults, "no such route", 404)
    with pytest.raises(TeacherStopped, match=r"completions is refused .* prefill is refused .* instruct is refused"):
        make()


def test_every_probe_is_a_request_of_its_own(make, server):
    teacher = make()
    teacher.probe()
    prompts = [entry["call"].body["prompt"] for entry in server.log]
    assert len(set(prompts)) == len(prompts) == 2


@pytest.mark.parametrize(
    ("asked", "answered", "is_same"),
    [
        ("m", "m", True),
        ("m", "", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("claude-haiku-4-5", "claude-haiku-4-5-20251001", True),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5-20260101", False),
        ("gemini-2.5-flash", "gemini-2.5-flash-001", True),
        ("gemini-2.5-flash", "models/gemini-2.5-flash", True),
        ("gemini-2.5-flash", "gemini-2.5-flash-lite", False),
        ("gemini-2.5-flash", "gemini-3.5-flash", False),
        ("gemini-flash-latest", "gemini-3.6-flash", True),
        ("/models/tiny", "/models/tiny@main", True),
        ("anthropic/claude-haiku-4-5", "claude-haiku-4-5", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4", "gpt-4o", False),
    ],
)
def test_names_of_one_model(asked, answered, is_same):
    assert is_same_model(asked, answered) is is_same
