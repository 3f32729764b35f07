"""Every function and every test that docs/paper_map.md names exists, and every claim names both."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = re.findall(r"^\| (\[[PRD]\]) \| (.+) \| `([\w.]+)` \| `([\w/.]+)::(\w+)` \|$",
                  (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8"), re.MULTILINE)  # fmt: skip


def definitions(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_every_row_of_the_map_is_read():
    lines = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8").splitlines()
    assert len(ROWS) == sum(line.startswith("| [") for line in lines) > 20


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2].removeprefix("omniopd_jax.") + "-" + row[4])
def test_the_function_and_its_test_exist(row):
    _, _, function, test_file, test = row
    module, name = function.rsplit(".", 1)
    source = ROOT / (module.replace(".", "/") + ".py")
    assert source.is_file(), f"docs/paper_map.md names {function}, but there is no {source.relative_to(ROOT)}"
    assert name in definitions(source), f"docs/paper_map.md names {function}, which does not exist"
    assert (ROOT / test_file).is_file(), f"docs/paper_map.md names {test_file}, which does not exist"
    assert test in definitions(ROOT / test_file), f"docs/paper_map.md names {test_file}::{test}, which does not exist"


def test_a_departure_says_how_to_switch_it_off():
    departures = [claim for _, claim, *_ in ROWS if "DEVIATION" in claim]
    assert departures
    assert all(re.search(r"`[\w.]+ = [^`]+` is the paper's form", claim) for claim in departures)


def test_every_public_function_of_the_method_is_on_the_map_or_serves_one_that_is():
    named = {function.rsplit(".", 1)[1] for _, _, function, *_ in ROWS}
    for name in ("select_anchors", "chunk_prior", "posterior_target", "omniopd_loss", "tree_loss", "fused_terms",
                 "entropy_and_logprob", "verify", "branch"):  # fmt: skip
        assert name in named
