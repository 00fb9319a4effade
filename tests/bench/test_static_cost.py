"""The static model against computations by hand."""

from collections import Counter

import pytest

from dcscale.bench.attention.static.cost import (
    Flash,
    Rates,
    Tiles,
    Traffic,
    Work,
    cost,
    efficiency,
    l2_hits,
    override,
    slots,
    total,
)
from dcscale.bench.attention.static.paths import Path, Paths

RATES = Rates(sms=100, clock=2.0, efficiency=0.5, tensor=500, l2=5.0, hbm=2.0, l2_size=40)
ISSUE_PS = 1e12 / (100 * 128 * 2e9)
"""One slot at full rate."""


def path(**counts):
    return Path(Counter(counts))


def work(kind="mix", **fields):
    return Work("k", "forward", kind, 1, fields.pop("traffic", Traffic()), **fields)


def test_slots_are_instructions_of_a_thread_for_each_visible_score():
    # 2 + 1 + 1 tiles of 4 warps with 16 scores a thread, of which half are visible in the edge tile.
    paths = Paths(path(fp32=320, load=32), path(fp32=320, load=32, select=16), path(store=8))
    visible = round(2.5 * 4 * 32 * 16)
    found = slots(paths, Tiles(2, 1, 1), 4, visible)
    assert found == pytest.approx({"fp32": 3 * 320 / 40, "load": 3 * 32 / 40, "select": 16 / 40, "store": 8 / 40})


def test_a_kernel_takes_as_long_as_the_slowest_of_what_it_needs():
    counts = {"fp32": 20.0, "exp": 1.0, "shuffle": 2.0, "shared": 1.0}
    traffic = Traffic(read=4e6, again=2e6, written=1e6, operands=5e6)
    found = cost(work(traffic=traffic, flops=1e9), 10**6, RATES, counts, hits=0.75)
    assert found.bounds == pytest.approx(
        {
            "issue": 24 * ISSUE_PS / 0.5,
            "exp": 8 * ISSUE_PS,
            "shared": 3 * 4 * ISSUE_PS,
            "tensor": 1000 / 500,
            "L2": 12 / 5.0,
            "HBM": 5.5 / 2.0,
        }
    )
    assert found.bound == "HBM"
    assert found.ps == pytest.approx(5.5 / 2.0)
    assert (found.hbm_bytes, found.l2_bytes) == (5.5, 12)


def test_sums_of_a_product_come_on_top_because_nothing_overlaps_them():
    traffic = Traffic(read=2e6, added=3e6)
    found = cost(work("product", traffic=traffic, flops=2e9), 10**6, RATES, {}, hits=1)
    assert found.bound == "tensor"
    assert found.ps == pytest.approx(2000 / 500 + 3 / 2.0)
    assert found.hbm_bytes == 5


def test_what_is_read_again_hits_l2_as_far_as_the_tiles_in_flight_fit():
    def hits(registers=128, shared=0, warps=8, seen=10**6):
        return l2_hits(again=seen * 100_000, seen=seen, registers=registers, shared=shared, warps=warps, rates=RATES)

    one = 0.55 * 40e6 / (100 * 100_000)  # one tile a multiprocessor
    assert one > 0.95
    assert hits(registers=200) == 0.95
    assert hits(registers=128) == 0.95
    assert hits(registers=64) == pytest.approx(one / 4)
    assert hits(registers=59) == pytest.approx(one / 4)  # given in eights
    assert hits(registers=32) == pytest.approx(one / 8)
    assert hits(registers=16) == pytest.approx(one / 8)  # 64 warps
    assert hits(registers=32, shared=37 * 1024) == pytest.approx(one / 6)
    assert hits(registers=32, seen=300) == pytest.approx(one / 3)
    assert l2_hits(0, 5, 32, 0, 4, RATES) == 1


def test_the_default_rates_are_those_of_the_published_model():
    # kernels of H=32 at 64 x 64 with 16-bit maps, two tiles a multiprocessor: 69 MB in flight, 40 % hits
    assert l2_hits(4096 * 32 * 2, 1, 32, 0, 4, Rates()) == 0.95
    assert l2_hits(10**4 * 4096 * 32 * 2, 10**4, 231, 0, 4, Rates()) == pytest.approx(0.4, abs=0.01)
    found = cost(work(), 1, Rates(), {"fp32": 1.0, "exp": 1.0}, hits=1)
    assert found.bounds["issue"] * Rates().efficiency / 2 == pytest.approx(0.034, abs=0.0005)
    assert found.bounds["exp"] == pytest.approx(0.27, abs=0.005)


def test_efficiency_is_the_slots_time_over_the_measured_time():
    found = cost(work(), 10**9, RATES, {"fp32": 10.0}, hits=1)
    assert efficiency(found.bounds["issue"], 10**9, 2 * 10 * ISSUE_PS, RATES) == pytest.approx(0.5)
    assert efficiency(0.0, 10**9, 1.0, RATES) is None


def test_launches_of_a_kernel_are_added():
    one = work(traffic=Traffic(1, 2, 3, 4, 5), elements=10, flops=7, tiles=Tiles(1, 2, 3))
    other = one._replace(traffic=Traffic(10, 0, 0, 0, 0), tiles=Tiles(5, 5, 5))
    both = total(iter([one, other]))
    assert both == one._replace(
        launches=2, traffic=Traffic(11, 2, 3, 4, 5), elements=20, flops=14, tiles=Tiles(6, 7, 8)
    )
    assert total([work("sum"), work("sum")]).tiles is None


def test_assumptions_can_be_replaced_and_say_so():
    rates = override(Rates(), ["hbm=3.0", "efficiency=0.8"])
    assert (rates.hbm, rates.efficiency, rates.l2) == (3.0, 0.8, 5.5)
    described = rates.describe()
    assert described["hbm"] == {"value": 3.0, "unit": "TB/s", "source": "given on the command line"}
    assert all(each["unit"] and each["source"] for each in described.values())
    assert "judgement" in described["l2"]["source"]


def test_figures_of_flash_attention_are_by_head_dim_or_given():
    assert Rates().flash(128) == Flash(1.3, 0.8)
    assert Rates().flash(96) is None
    assert override(Rates(), ["flash_2=1.1"]).flash(128) == Flash(1.1, 0.8)
    assert override(Rates(), ["flash_2=1.1"]).flash(96) is None
    assert override(Rates(), ["flash_2=1.1", "flash_3=0.7"]).flash(96) == Flash(1.1, 0.7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hmb=3", "'hmb' is no assumption of the model; it has sms, clock"),
        ("hbm", "'' must be a number above 0"),
        ("hbm=fast", "'fast' must be a number above 0"),
        ("hbm=0", "'0' must be a number above 0"),
        ("hbm=inf", "'inf' must be a number above 0"),
        ("hbm=nan", "'nan' must be a number above 0"),
    ],
)
def test_wrong_assumptions_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        override(Rates(), [text])
    assert str(error.value).startswith(repr(text))
