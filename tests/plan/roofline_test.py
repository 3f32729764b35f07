"""The ceilings' arithmetic, and the figures that they rest on."""

import pytest

from omniopd_jax.plan.roofline import roofline
from omniopd_jax.plan.topology import CHIPS, Chip

CHIP = Chip("a chip", peak_flops=100.0, memory_bytes=1e9, memory_bandwidth=10.0, link_bandwidth=2.0, source="here")


def test_three_ceilings():
    found = roofline(300.0, 50.0, {"data": 4.0, "fsdp": 6.0}, CHIP)
    assert (found.compute, found.memory, found.network) == (3.0, 5.0, 5.0)
    assert found.at_best == 5.0
    assert found.at_worst == 13.0
    assert roofline(900.0, 50.0, {}, CHIP).bound_by == "compute"


@pytest.mark.parametrize(
    ("name", "product_of_pod", "chips"), [("v5e", 50.63e15, 256), ("v6e", 234.9e15, 256), ("v5p", 8960 * 459e12, 8960)]
)
def test_a_pods_published_peak_is_that_of_its_chips(name, product_of_pod, chips):
    assert CHIPS[name].peak_flops * chips == pytest.approx(product_of_pod, rel=5e-3)


@pytest.mark.parametrize(("name", "gigabits", "links"), [("v5e", 1600, 4), ("v5p", 4800, 6), ("v6e", 3200, 4)])
def test_one_dimension_of_the_torus_is_two_of_a_chips_links(name, gigabits, links):
    """Google also gives the links of a chip in gigabits a second, one way."""
    assert CHIPS[name].link_bandwidth == pytest.approx(gigabits / 8 * 1e9 * 2 / links)
