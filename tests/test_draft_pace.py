"""How many tokens to guess: learned from numbers that are given here, not measured."""

from __future__ import annotations

import pytest

from runtime.draft_pace import (
    COST_SLOPE,
    MAX_DRAFT_TOKENS,
    PAUSE_RUNS,
    REFRESH_RUNS,
    RUN_TOKENS,
    Acceptance,
    Outcome,
    Pace,
    RunCosts,
)
from runtime.errors import RequestError

RUN_MS = {1: 40.0, 2: 45.0, 4: 52.0, 6: 53.0, 8: 63.0, 12: 73.0, 16: 84.0, 24: 106.0, 32: 129.0}
"""774M int8 on two cores."""


def outcome(pace: Pace, *, guesses: int = 0, accepted: int = 0, draft_ms: float = 0.0) -> Outcome:
    return Outcome(
        guesses=guesses,
        tried=guesses,
        accepted=accepted,
        tokens=accepted + 1,
        draft_ms=draft_ms,
        run_ms=RUN_MS[pace.run_size(guesses)],
        other_ms=0.0,
    )


def settled(pace: Pace) -> Pace:
    """The same pace after enough runs without guesses, and one of each size."""
    for size in RUN_TOKENS:
        pace.ran(None, outcome(pace, guesses=size - 1))
    for _ in range(500):
        pace.ran(None, outcome(pace))
    return pace


def guesses(pace: Pace, *, kind: int = 0, most: int = 100, draft_ms: float = 0.0) -> int:
    return pace.plan(kind, most, lambda count: count * draft_ms).guesses


# What runs take


def test_of_the_first_runs_of_a_size_the_fastest_counts() -> None:
    costs = RunCosts()
    costs.observe(1, 90)
    assert costs.ms(1) == 90
    assert not costs.settled(1)
    for ms in (40, 60):
        costs.observe(1, ms)
        assert costs.ms(1) == 40
        assert costs.settled(1)


def test_sizes_between_measured_ones_are_on_a_line() -> None:
    costs = RunCosts()
    costs.observe(4, 50)
    costs.observe(8, 70)
    assert [costs.ms(tokens) for tokens in (5, 6, 7)] == pytest.approx([55, 60, 65])


def test_sizes_beyond_measured_ones_follow_the_slope() -> None:
    costs = RunCosts()
    costs.observe(1, 40)
    assert costs.ms(11) == pytest.approx(40 * (1 + 10 * COST_SLOPE))
    costs.observe(2, 60)
    assert costs.ms(4) == pytest.approx(100)  # steeper than expected
    costs = RunCosts()
    costs.observe(11, 80)
    assert costs.ms(1) == pytest.approx(80 / (1 + 10 * COST_SLOPE))


def test_one_slow_run_does_not_spoil_what_was_learned() -> None:
    costs = RunCosts()
    for ms in (40, 40, 40, 40, 4000):
        costs.observe(1, ms)
    assert costs.ms(1) < 50


def test_times_follow_a_machine_that_slows_down() -> None:
    costs = RunCosts()
    for ms in [40] * 10 + [60] * 20:
        costs.observe(1, ms)
    assert costs.ms(1) == pytest.approx(60, rel=0.02)


def test_a_size_that_was_not_run_for_long_is_learned_anew() -> None:
    costs = RunCosts()
    for _ in range(5):
        costs.observe(1, 90)
    for _ in range(50):
        costs.observe(8, 80)
    costs.observe(1, 40)
    assert costs.ms(1) == 65


def test_fewer_tokens_never_take_longer_than_more() -> None:
    costs = RunCosts()
    for _ in range(2):
        costs.observe(1, 100)  # as others used the processor
        costs.observe(2, 45)
    assert costs.ms(1) == 45


def test_a_long_prompt_counts_by_the_token() -> None:
    costs = RunCosts()
    costs.observe(100, 400)
    assert costs.ms(128) == pytest.approx(512)


# What was accepted


def test_nothing_known_is_an_even_chance_at_each_place() -> None:
    assert [Acceptance().expected_tokens(count) for count in (0, 1, 2)] == [1, 1.5, 1.75]


def test_guesses_that_were_right_promise_that_all_are() -> None:
    acceptance = Acceptance()
    for _ in range(30):
        acceptance.observe(4, tried=4)
    assert acceptance.expected_tokens(4) == pytest.approx(5, rel=0.1)
    assert acceptance.expected_tokens(MAX_DRAFT_TOKENS) > 15  # places that were never tried


def test_a_wrong_first_guess_tells_nothing_of_the_second() -> None:
    acceptance = Acceptance()
    for _ in range(5):
        acceptance.observe(2, tried=2)
    for _ in range(30):
        acceptance.observe(0, tried=2)
    first = acceptance.expected_tokens(1) - 1
    second = (acceptance.expected_tokens(2) - acceptance.expected_tokens(1)) / first
    assert first < 0.1
    assert second > 0.8


def test_an_end_is_no_wrong_guess() -> None:
    ended, unknown = Acceptance(), Acceptance()
    ended.observe(0, tried=0)
    assert ended.expected_tokens(8) == unknown.expected_tokens(8)


# The choice


@pytest.mark.parametrize("draft_tokens", [0, MAX_DRAFT_TOKENS + 1, 1.5, True])
def test_a_length_out_of_range_is_refused(draft_tokens: int) -> None:
    with pytest.raises(RequestError, match=r"draft_tokens is .*, expected 1 to 31, or none to adapt"):
        Pace(draft_tokens=draft_tokens)


def test_nothing_is_guessed_before_a_plain_run_was_timed() -> None:
    pace = Pace()
    assert guesses(pace) == 0
    assert pace.plan(0, 5, lambda _: 0.0).ms is None


def test_nothing_is_guessed_where_the_draft_has_nothing() -> None:
    assert settled(Pace()).plan(None, 100, lambda _: 0.0).guesses == 0


def test_right_guesses_make_runs_long_and_wrong_ones_end_them() -> None:
    pace = settled(Pace())
    for _ in range(10):
        count = guesses(pace)
        pace.ran(0, outcome(pace, guesses=count, accepted=count))
    assert guesses(pace) == MAX_DRAFT_TOKENS
    for _ in range(40):
        pace.ran(0, outcome(pace, guesses=guesses(pace)))
    assert guesses(pace) == 0


def test_each_kind_of_guess_has_its_own_chance() -> None:
    pace = settled(Pace())
    for _ in range(10):
        pace.watched(0, 0, tried=4)
        pace.watched(1, 4, tried=4)
    assert guesses(pace, kind=0) == 0
    assert guesses(pace, kind=1) > 4


def test_a_dear_draft_is_asked_for_less() -> None:
    free, dear, too_dear = (settled(Pace()) for _ in range(3))
    for pace in (free, dear, too_dear):
        for accepted in (0, 1, 2, 3, 4) * 4:
            pace.watched(0, accepted, tried=4)
    assert guesses(free) > guesses(dear, draft_ms=15) > guesses(too_dear, draft_ms=40) == 0


def test_catching_up_is_an_outlay_that_must_come_back() -> None:
    """Over the rest of the text, not in the next run."""
    pace = settled(Pace())
    for accepted in (0, 1, 2, 3, 4) * 4:
        pace.watched(0, accepted, tried=4)
    planned = {most: pace.plan(0, most, lambda _: 0.0, catch_up_ms=lambda: 200.0).guesses for most in (6, 100)}
    assert planned == {6: 0, 100: guesses(pace)}


def test_no_run_is_larger_than_what_has_room() -> None:
    pace = settled(Pace())
    for _ in range(10):
        pace.watched(0, 4, tried=4)
    assert [guesses(pace, most=most) for most in (0, 1, 2, 3, 30)] == [0, 1, 1, 3, 23]
    assert guesses(Pace(draft_tokens=9), most=4) == 4


def test_what_was_lost_is_not_risked_again() -> None:
    """However good the guesses are taken to be: plain steps must earn it first, 3 in a hundred."""
    pace = settled(Pace())
    for _ in range(12):
        pace.ran(None, Outcome(guesses=31, tried=0, accepted=0, tokens=1, draft_ms=0, run_ms=129, other_ms=0))
    for _ in range(10):
        pace.watched(0, 4, tried=4)
    assert guesses(pace) == 0
    for _ in range(700):
        pace.ran(None, outcome(pace))
    assert guesses(pace) > 0


def test_a_size_is_tried_after_one_of_half_of_it() -> None:
    pace, tried = Pace(), []
    for _ in range(100):
        pace.ran(None, outcome(pace))
    for _ in range(10):
        pace.watched(0, 4, tried=4)
        tried.append(guesses(pace) + 1)
        pace.ran(0, outcome(pace, guesses=tried[-1] - 1, accepted=tried[-1] - 1))
    assert tried[:5] == [2, 4, 8, 16, 32]


def test_what_was_won_may_be_risked() -> None:
    pace = settled(Pace())
    for _ in range(4):
        pace.ran(0, outcome(pace, guesses=7, accepted=7))
    assert guesses(pace, draft_ms=20) > 4


def test_a_plain_run_comes_now_and_then_however_good_the_guesses() -> None:
    pace = settled(Pace())
    planned = []
    for _ in range(3 * REFRESH_RUNS):
        planned.append(guesses(pace))
        pace.ran(0, outcome(pace, guesses=planned[-1], accepted=planned[-1]))
    assert 0 < planned.count(0) <= 3


def test_exact_runs_are_even() -> None:
    pace = Pace(exact=True)
    assert [pace.run_size(count) for count in (0, 1, 2, 3, 4, 31)] == [2, 2, 4, 4, 6, 32]
    assert all(size % 2 == 0 for size in RUN_TOKENS)


def test_in_exact_mode_a_first_guess_is_free() -> None:
    exact, default = settled(Pace(exact=True)), settled(Pace())
    for pace in (exact, default):
        for _ in range(30):
            pace.watched(0, 0, tried=1)
    assert (guesses(exact), guesses(default)) == (1, 0)


def test_in_exact_mode_a_run_with_a_guess_says_nothing_of_plain_ones() -> None:
    """As large a piece takes longer behind a draft's run: two tokens in 100 ms are no win where plain ones take 45."""
    pace = Pace(exact=True)
    for _ in range(500):
        pace.ran(None, outcome(pace))
    for _ in range(20):
        pace.ran(0, Outcome(guesses=1, tried=1, accepted=1, tokens=2, draft_ms=30, run_ms=70, other_ms=0))
    assert guesses(pace, most=1, draft_ms=30) == 0
    assert pace.plan(None, 0, lambda _: 0.0).ms == pytest.approx(RUN_MS[2])


def test_a_fixed_length_is_kept_whatever_comes_of_it() -> None:
    pace = settled(Pace(draft_tokens=5))
    for _ in range(20):
        pace.ran(0, Outcome(guesses=5, tried=5, accepted=0, tokens=1, draft_ms=500, run_ms=50, other_ms=0))
    assert guesses(pace) == 5


def test_guesses_that_do_not_pay_are_seldom_weighed() -> None:
    pace, asked = settled(Pace()), []
    for _ in range(30):
        pace.watched(0, 0, tried=4)

    def draft_ms(count: int) -> float:
        asked.append(count)
        return 0.0

    def catch_up_ms() -> float:
        raise AssertionError("nothing would be guessed")

    for _ in range(10 * (PAUSE_RUNS + 1)):
        assert pace.plan(0, 100, draft_ms, catch_up_ms=catch_up_ms).guesses == 0
        pace.ran(0, outcome(pace))
    assert len(asked) == 10 * len(RUN_TOKENS)


def test_what_is_learned_of_guesses_counts_at_once() -> None:
    pace = settled(Pace())
    for _ in range(30):
        pace.watched(0, 0, tried=4)
    assert guesses(pace) == 0
    for _ in range(30):
        pace.watched(0, 4, tried=4)
    assert guesses(pace) > 4


def test_a_plan_says_what_to_expect() -> None:
    pace = settled(Pace(draft_tokens=3))
    for _ in range(40):
        pace.ran(0, outcome(pace, guesses=3, accepted=3, draft_ms=9))
    plan = pace.plan(0, 100, lambda count: 3.0 * count)
    assert plan.tokens == pytest.approx(4, rel=0.1)
    assert plan.ms == pytest.approx(RUN_MS[4] + 9)


def test_watching_takes_a_small_share_of_the_time() -> None:
    pace = settled(Pace())
    asked = [pace.may_watch(20)]
    for _ in range(200):
        pace.ran(0, outcome(pace))
        asked.append(pace.may_watch(20))
    assert sum(asked) * 20 <= 0.011 * 250 * RUN_MS[1]
    assert sum(asked) > 3
