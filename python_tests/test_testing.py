"""The comparison that the other tests rely on fails where it should, and says where."""

import time

import pytest
import torch

from w2w_fast.testing import allowed, assert_close, race, timer


def test_failure_names_the_worst_entry():
    got = torch.tensor([[1.0, 2.0], [3.0, 4.5]])
    want = torch.tensor([[1.0, 2.1], [3.0, 4.0]])
    assert_close("w", got, want, 0.5)
    with pytest.raises(AssertionError) as error:
        assert_close("w", got, want, 0.25)
    for part in ("w[1, 1]", "4.5", "4.0", "5.000e-01 is 2.00 of the allowed", "1 of 4 entries"):
        assert part in str(error.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_must_stand_where_wanted(bad):
    sick = torch.tensor([0.0, bad])
    assert_close("w", sick, sick, 0.0)
    for got, want in ((sick, torch.zeros(2)), (torch.zeros(2), sick)):
        with pytest.raises(AssertionError, match="inf of the allowed|error inf"):
            assert_close("w", got, want, 1e9)


def test_shapes_must_agree_and_empty_is_equal():
    with pytest.raises(AssertionError, match="shape"):
        assert_close("w", torch.zeros(2), torch.zeros(2, 1), 1.0)
    assert_close("w", torch.zeros(0, 3), torch.zeros(0, 3), 0.0)
    assert allowed(torch.zeros(0), torch.zeros(0)) == 0.0


def test_allowed_is_twice_torchs_error_and_a_rounding():
    plain, want = torch.tensor([1.0, 100.25]), torch.tensor([1.0, 100.0])
    eps = torch.finfo(torch.float32).eps
    assert allowed(plain, want) == pytest.approx(0.5 + 100 * eps)
    assert allowed(want.bfloat16(), want) == pytest.approx(100 * 2**-7)
    assert allowed(want, want, terms=torch.tensor(1e6)) == pytest.approx(1e6 * eps)


def test_timer_counts():
    calls = []
    timing = timer(lambda: calls.append(1), seconds=0.0, calls=3)
    assert timing.calls == 3 and len(calls) == 4 and 0 <= timing.best <= timing.median


def test_race_takes_turns():
    turns = []
    calls = {name: (lambda name=name: turns.append(name)) for name in "ab"}
    timings = race(calls, seconds=0.0, rounds=3, before=lambda: turns.append("-"))
    assert "".join(turns) == "ab" + "-a-b" * 3
    assert {name: timing.calls for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_race_does_not_wait_for_the_slow():
    calls = {"slow": lambda: time.sleep(0.02), "quick": lambda: None}
    timings = race(calls, seconds=0.001, rounds=5, warm=False)
    assert timings["slow"].calls == 2 and timings["quick"].calls >= 5
    assert timings["slow"].median >= 0.02 > timings["quick"].median
