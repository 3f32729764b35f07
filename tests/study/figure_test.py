"""The figure is well-formed SVG whose points lie where the numbers say."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from omniopd_jax.study import figure
from omniopd_jax.study.figure import Line, Panel

SVG = "{http://www.w3.org/2000/svg}"


def lines(count=2):
    x = [0.0, 50.0, 100.0]
    return [Line(f"arm <{i}>", x, [10.0 * i, 50, 90], [5.0, 45, 85], [15.0, 55, 95]) for i in range(count)]


def test_it_is_svg_with_a_line_a_band_and_one_legend_entry_each():
    text = figure.svg(
        [Panel("A & B", "updates", lines(), (0, 100)), Panel("C", "tokens", lines())], columns=2, title='a"b'
    )
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == 'a"b'
    assert len(root.findall(f".//{SVG}polyline")) == len(root.findall(f".//{SVG}polygon")) == 4
    assert [node.text for node in root.iter(f"{SVG}text")].count("arm <1>") == 1


def test_points_are_linear_in_the_values():
    root = ElementTree.fromstring(figure.svg([Panel("A", "x", lines(1), (0, 100))], columns=1, title=""))
    points = root.find(f".//{SVG}polyline").get("points").split()
    xs, ys = np.array([[float(part) for part in point.split(",")] for point in points]).T
    np.testing.assert_allclose(np.diff(xs), np.diff(xs)[0], atol=0.11)
    np.testing.assert_allclose(np.diff(ys), [np.diff(ys)[0], np.diff(ys)[0] * 0.8], atol=0.2)
    assert ys[0] > ys[-1], "larger values stand higher"


def test_every_label_has_a_look_of_its_own():
    labels = [f"arm {i}" for i in range(2 * len(figure.COLOURS))]
    assert len({figure._stroke(labels, label) for label in labels}) == len(labels)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 100), (3, 17), (0, 84_000), (-0.2, 0.31), (5, 5)])
def test_ticks_are_few_round_and_inside(low, high):
    found = figure.ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    if high > low:
        steps = np.diff(found)
        np.testing.assert_allclose(steps, steps[0])
        assert float(f"{steps[0]:.0e}"[0]) in (1, 2, 5)


def test_a_figure_of_nothing():
    ElementTree.fromstring(figure.svg([Panel("A", "x", [])], columns=3, title=""))
