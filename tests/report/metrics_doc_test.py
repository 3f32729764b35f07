"""docs/metrics.md says what the code writes: every name, its unit and its meaning."""

import re
from pathlib import Path

from omniopd_jax.report.curves import CHARTS
from omniopd_jax.train.metrics import REGISTRY

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+/[\w*]+)` \| (.+?) \| (.+) \|$", re.M)


def documented():
    return {
        name: (unit, text)
        for name, unit, text in ROW.findall((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"))
    }


def test_registered_metrics_are_documented_in_the_same_words():
    rows = documented()
    for name, meaning in REGISTRY.items():
        assert rows.get(name) == tuple(meaning), (
            f"docs/metrics.md should say: | `{name}` | {meaning.unit} | {meaning.text} |"
        )


def test_what_verification_and_the_clock_write_is_documented():
    verify = (ROOT / "omniopd_jax" / "teacher" / "verify.py").read_text(encoding="utf-8")
    loop = (ROOT / "omniopd_jax" / "train" / "loop.py").read_text(encoding="utf-8")
    names = set(re.findall(r'"((?:audit|teacher)/[a-z_]+)"', verify))
    names |= {f"time/{phase}_s" for phase in re.findall(r'clock\.phase\("(\w+)"\)', loop) if phase != "export"}
    assert len(names) > 20
    assert not names - documented().keys()


def test_every_chart_draws_a_documented_metric():
    names = {name for chart in CHARTS for line in chart.lines for name in line[:1]}
    names |= {name for chart in CHARTS for name in chart.band or ()}
    assert not names - documented().keys()


def test_no_row_stands_twice():
    names = [name for name, *_ in ROW.findall((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"))]
    assert len(names) == len(set(names))
