"""Rows of each benchmark, in the layout in which it is published, become prompts with references that can be judged."""

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest

from omniopd_jax import config
from omniopd_jax.eval import math, sandbox
from omniopd_jax.eval.code import CodeReference, judge_program, make_sandbox
from omniopd_jax.eval.tasks import TASKS, read_task
from omniopd_jax.types import InputError

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


def written(folder: Path, rows, name="rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("task", "row", "response"),
    [
        ("gsm8k", {"question": "Q?", "answer": "6 + 12 = <<6+12=18>>18\n#### 18"}, r"\boxed{18}"),
        (
            "math",
            {
                "problem": "Q?",
                "solution": r"so \boxed{\frac12}",
                "answer": r"\frac12",
                "level": 2,
                "unique_id": "a/1.json",
            },
            r"\boxed{0.5}",
        ),
        ("math", {"problem": "Q?", "solution": r"first \boxed{1}, then \boxed{3}"}, r"\boxed{3}"),
        (
            "aime",
            {"id": 60, "problem": "Q?", "solution": "long", "answer": "073", "url": "", "year": "2024"},
            r"\boxed{73}",
        ),
        ("aime", {"ID": "2024-I-4", "Problem": "Q?", "Solution": "long", "Answer": 116}, r"\boxed{116}"),
        ("aime", {"question": "Q?", "answer": "70"}, r"\boxed{70}"),
        ("amc", {"id": 0, "problem": "Q?", "answer": 142.0, "url": ""}, r"\boxed{142}"),
        ("amc", {"id": 0, "question": "Q?", "answer": "27", "url": ""}, r"\boxed{27}"),
        ("olympiad", {"id": 1606, "question": "Q?", "final_answer": ["2"], "unit": None}, r"\boxed{2}"),
        ("olympiad", {"id": 1607, "question": "Q?", "final_answer": ["$-1$", "$7$"]}, r"\boxed{7, -1}"),
        ("olympiad", {"id": 1608, "question": "Q?", "final_answer": ["$[-1,1)$"]}, r"\boxed{[-1, 1)}"),
    ],
)
def test_mathematics(tmp_path, task, row, response):
    pytest.importorskip("math_verify")
    (prompt,) = read_task(task, written(tmp_path, [row]))
    assert prompt.messages[-1].content == f"Q?\n\n{BOXED}"
    assert prompt.id in {str(row.get(key)) for key in ("id", "ID", "unique_id")} | {"rows:0"}
    assert math.is_correct(response, prompt.answer)
    assert not math.is_correct(r"\boxed{999}", prompt.answer)


def test_how_a_problem_is_asked(tmp_path):
    path = written(tmp_path, [{"question": "Q?", "answer": "#### 1"}])

    def asked(**options):
        return [message.content for message in read_task("gsm8k", path, **options)[0].messages]

    assert asked(instruction="Say: {problem}") == ["Say: Q?"]
    assert asked(system_prompt="End with ####.") == ["End with ####.", "Q?"], "as it was trained"
    assert asked(is_raw=True) == ["Q?"]
    with pytest.raises(InputError, match="does not say where the problem goes"):
        asked(instruction="Think.")
    turns = [{"role": "user", "content": "Solve it. Answer: $Answer"}]
    row = {"prompt": turns, "reward_model": {"ground_truth": "34"}, "data_source": "math_dapo"}
    (prompt,) = read_task("math", written(tmp_path, [row]))
    assert (prompt.messages[0].content, prompt.answer) == (turns[0]["content"], "34"), "a conversation is left as it is"


def test_columns_of_ones_own(tmp_path):
    path = written(tmp_path, [{"task": "Q?", "key": "5", "answer": "6"}])
    (prompt,) = read_task("math", path, prompt_field="task", answer_field="key")
    assert prompt.answer == "5"
    with pytest.raises(InputError, match=r"rows.jsonl line 1 has no prompt"):
        read_task("math", path)


def test_a_runs_columns_do_not_keep_it_from_a_benchmark_in_another_layout(tmp_path):
    """configs/gsm8k.py says question and answer; MATH-500 has problem, OlympiadBench final_answer."""
    math500 = {"problem": "P?", "solution": r"so \boxed{7}", "answer": "7", "subject": "Algebra", "level": 2,
               "unique_id": "test/algebra/1.json"}  # fmt: skip
    (prompt,) = read_task("math", written(tmp_path, [math500]), prompt_field="question", answer_field="answer")
    assert (prompt.id, prompt.answer) == ("test/algebra/1.json", "7")
    assert prompt.messages[-1].content.startswith("P?")
    olympiad = {"id": 1, "question": "Q?", "final_answer": ["2"], "answer_type": "Numerical"}
    (prompt,) = read_task("olympiad", written(tmp_path, [olympiad]), prompt_field="question", answer_field="answer")
    assert prompt.answer == "2"
    both = {"question": "the run's", "problem": "the task's", "answer": "1"}
    (prompt,) = read_task("math", written(tmp_path, [both]), prompt_field="question", answer_field="")
    assert prompt.messages[-1].content.startswith("the run's"), "a column that the row has goes first"
    with pytest.raises(InputError, match=r"no prompt: expected text or problem or .*, found level"):
        read_task("math", written(tmp_path, [{"level": 2}]), prompt_field="text")


def test_a_problem_that_a_file_repeats_counts_once(tmp_path):
    """verl's aime-2024 holds each problem 32 times, told apart by an index alone."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"Solve {problem}."}],
            "reward_model": {"ground_truth": str(problem), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": copy * 3 + problem, "raw_problem": str(problem)},
        }
        for copy in range(4)
        for problem in range(3)
    ]
    prompts = read_task("aime", written(tmp_path, rows))
    assert [(prompt.id, prompt.answer) for prompt in prompts] == [("rows:0", "0"), ("rows:1", "1"), ("rows:2", "2")]


def test_humaneval_tests_call_the_programs_function_and_their_own_helpers(tmp_path):
    row = {
        "task_id": "HumanEval/32",
        "prompt": "def poly(x):\n    return x - 2\n\ndef zero():\n    '''Zero of poly.'''\n",
        "canonical_solution": "    return 2\n",
        "test": "def check(candidate):\n    assert poly(candidate()) == 0 and zero() == candidate()",
        "entry_point": "zero",
    }
    (prompt,) = read_task("humaneval", written(tmp_path, [row]))
    assert prompt.id == "HumanEval/32"
    assert "```python\ndef poly" in prompt.messages[0].content
    if sandbox.wall_here()[0]:
        place = make_sandbox("local")
        assert judge_program("    return 2\n", prompt.answer, sandbox=place).passed
        cheat = "```python\ndef poly(x):\n    return 0\ndef zero():\n    return 5\n```"
        assert not judge_program(cheat, prompt.answer, sandbox=place).passed


def test_mbpp_full_and_sanitized(tmp_path):
    full = {
        "task_id": 11, "text": "Write f.", "code": "def f", "test_setup_code": "class P: pass",
        "test_list": ["assert f(1) == 1", "assert f(2) == 2"], "challenge_test_list": [],
    }  # fmt: skip
    sanitized = {"task_id": 12, "prompt": "Write g.", "test_imports": ["import math"], "test_list": ["assert g() == 1"]}
    first, second = read_task("mbpp", written(tmp_path, [full, sanitized]))
    assert (
        "Write f.\nYour code should pass these tests:\n\nassert f(1) == 1\nassert f(2) == 2"
        in first.messages[0].content
    )
    assert CodeReference.loads(first.answer).tests == "class P: pass\nassert f(1) == 1\nassert f(2) == 2"
    assert CodeReference.loads(second.answer).tests == "import math\n\nassert g() == 1"


def packed(cases) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def test_livecodebench_by_stdin_and_by_calls(tmp_path):
    public, private = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}], [{"input": "2", "output": "3"}]
    row = {"question_id": "abc", "question_content": "Add one.", "starter_code": "", "metadata": "{}",
           "public_test_cases": json.dumps(public), "private_test_cases": packed(private)}  # fmt: skip
    calls = [{"input": "[1, 2]\n1", "output": "[2, 3]", "testtype": "functional"}]
    method = {"question_id": "def", "question_content": "Add.", "metadata": '{"func_name": "add"}',
              "starter_code": "class Solution:\n    def add(self, x: List[int], y: int) -> List[int]:\n        ",
              "public_test_cases": json.dumps(calls), "private_test_cases": "[]"}  # fmt: skip
    by_stdin, by_call = read_task("livecodebench", written(tmp_path, [row, method]))
    assert CodeReference.loads(by_stdin.answer).cases == (("1\n", "2\n"), ("2", "3"))
    assert "stdin" in by_stdin.messages[0].content
    assert "class Solution" in by_call.messages[0].content
    if sandbox.wall_here()[0]:
        place = make_sandbox("local")
        assert judge_program("```\nprint(int(input()) + 1)\n```", by_stdin.answer, sandbox=place).passed
        assert not judge_program("```\nprint(2)\n```", by_stdin.answer, sandbox=place).passed
        solution = (
            "```python\nclass Solution:\n    def add(self, x: List[int], y):\n        return (*map(y.__add__, x),)\n```"
        )
        assert judge_program(solution, by_call.answer, sandbox=place).passed
        assert not judge_program(solution.replace("add__", "sub__"), by_call.answer, sandbox=place).passed


def test_livecodebenchs_programs_find_what_its_own_runner_gives_them(tmp_path):
    """Modules by their names, the functions within by theirs, and a recursion of more than Python's 1000."""
    row = {"question_id": "abc", "question_content": "Sum to n.", "starter_code": "", "metadata": "{}",
           "public_test_cases": json.dumps([{"input": "5000\n", "output": "12502500\n"}])}  # fmt: skip
    (prompt,) = read_task("livecodebench", written(tmp_path, [row]))
    reference = CodeReference.loads(prompt.answer)
    script = """
def total(n):
    return n + total(n - 1) if n else 0
assert bisect.bisect_left([1, 2], 2) == bisect_left([1, 2], 2) == 1
assert datetime.datetime.min.year == copy.copy(1) == deepcopy(1) == 1
assert json.loads("1") == operator.add(0, 1) == reduce(add, [0, 1]) and io.StringIO(dumps(1)).read() == "1"
assert floor(sqrt(5)) == 2 and Counter("a")["a"] == len(list(permutations([1]))) and Optional[int]
sys.stdout.write(str(total(int(stdin.readline()))))
"""
    if sandbox.wall_here()[0]:
        assert judge_program(f"```python\n{script}```", prompt.answer, sandbox=make_sandbox("local")).passed
    assert reference.calls == 0, "each stdin is a run with the whole time"
    calls = [{"input": str(i), "output": str(i)} for i in range(7)]
    method = row | {"starter_code": "class Solution:", "metadata": '{"func_name": "f"}',
                    "public_test_cases": json.dumps(calls)}  # fmt: skip
    (prompt,) = read_task("livecodebench", written(tmp_path, [method]))
    assert CodeReference.loads(prompt.answer).calls == 7


class Evil:
    def __reduce__(self):
        return (print, ("called",))


def test_a_pickle_that_would_call_something_is_refused(tmp_path, capsys):
    text = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    row = {"question_id": "a", "question_content": "Q", "public_test_cases": text}
    with pytest.raises(InputError, match=r"line 1 has tests that cannot be read .*wants to call builtins.print"):
        read_task("livecodebench", written(tmp_path, [row]))
    assert "called" not in capsys.readouterr().out
    for junk in ("%%%", base64.b64encode(b"junk").decode(), "[1]", '[{"input": "1"}]'):
        with pytest.raises(InputError, match="cannot be read"):
            read_task("livecodebench", written(tmp_path, [row | {"public_test_cases": junk}]))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    rows = [{"task_id": 1, "text": "Write f.", "test_list": ["assert f() == 1"], "test_setup_code": ""}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert CodeReference.loads(read_task("mbpp", path)[0].answer).tests == "\nassert f() == 1"


def test_rows_that_do_not_fit_say_so(tmp_path):
    for task, row, message in (
        ("humaneval", {"prompt": "x"}, "line 1 has no text in the column 'test'; it has prompt"),
        ("mbpp", {"text": "x"}, "line 1 has no list test_list"),
        ("livecodebench", {"question_content": "x", "starter_code": "class"}, "no func_name"),
        ("chess", {}, "Task 'chess' is not known; there are 'gsm8k'"),
    ):
        with pytest.raises(InputError, match=message):
            read_task(task, written(tmp_path, [row]))


def test_the_config_knows_the_same_tasks():
    assert set(config._TASKS) == set(TASKS) - {"world"}
