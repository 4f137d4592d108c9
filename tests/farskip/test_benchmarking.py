"""Which repeats count, in what order they are taken, what is said about them, and what a variant has to prove."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from farskip.benchmarking import (
    SKEW,
    Computed,
    CoreAccount,
    CoreTimes,
    Repeat,
    difference,
    fixed_experts,
    fixed_routing,
    gained,
    interleave,
    summarize,
)
from farskip.stage import Routing


def repeat(ms: float, clean: bool = True, exposed_ms: float | None = None) -> Repeat:
    return Repeat(ms=ms, delay_share=0.0 if clean else 1.0, is_clean=clean, exposed_ms=exposed_ms)


def test_only_clean_repeats_are_summed_up() -> None:
    summary = summarize([repeat(1), repeat(900, clean=False), repeat(3), repeat(2), repeat(5), repeat(4)])
    assert summary is not None
    assert (summary.p25_ms, summary.median_ms, summary.p75_ms) == (2, 3, 4)
    assert (summary.clean_repeats, summary.rejected_repeats) == (5, 1)


def test_one_clean_repeat_is_its_own_spread_and_none_is_no_summary() -> None:
    summary = summarize([repeat(7)])
    assert summary is not None and (summary.p25_ms, summary.median_ms, summary.p75_ms) == (7, 7, 7)
    assert summarize([repeat(7, clean=False)]) is None


def test_what_was_exposed_is_a_median_of_clean_repeats_and_nothing_where_nobody_could_tell() -> None:
    told = summarize([repeat(1, exposed_ms=4), repeat(1, exposed_ms=6), repeat(9, clean=False, exposed_ms=99)])
    assert told is not None and told.exposed_ms == 5
    untold = summarize([repeat(1)])
    assert untold is not None and untold.exposed_ms is None


def test_every_round_has_every_variant_once_and_starts_with_another_one() -> None:
    order: list[str] = []

    def timed(name: str) -> Repeat:
        order.append(name)
        return repeat(1)

    interleave(["a", "b", "c"], timed, clean_repeats=4, max_rounds=9)
    rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_rounds_go_on_until_the_last_variant_has_enough_clean_repeats() -> None:
    seen: Counter[str] = Counter()

    def timed(name: str) -> Repeat:
        seen[name] += 1
        return repeat(1, clean=name == "quiet" or seen[name] > 3)

    found = interleave(["quiet", "late"], timed, clean_repeats=2, max_rounds=20)
    assert len(found["quiet"]) == len(found["late"]) == 5
    found = interleave(["never"], lambda name: repeat(1, clean=False), clean_repeats=1, max_rounds=6)
    assert len(found["never"]) == 6


def test_gains_are_those_of_their_definitions() -> None:
    gain = gained(150.0, blocking_ms=200.0, free_ms=100.0, allowed_share=0.8)
    assert gain.speedup == pytest.approx(4 / 3)
    assert gain.hidden_share == pytest.approx(0.5)
    assert gain.window_share == pytest.approx(0.625)


def test_no_share_where_there_is_nothing_to_hide() -> None:
    assert gained(1.0, blocking_ms=None, free_ms=1.0).speedup is None
    assert gained(1.0, blocking_ms=2.0, free_ms=None, allowed_share=1.0).window_share is None
    assert gained(1.0, blocking_ms=2.0, free_ms=2.0).hidden_share is None
    assert gained(1.0, blocking_ms=2.0, free_ms=1.0, allowed_share=0.0).window_share is None


def test_the_account_of_cores_is_read_in_milliseconds(tmp_path: Path) -> None:
    accounts = {
        "7": "111000000 2500000 7\n",
        "8": "3000000 100000 1\n",
        "9": "1000000 200000 1\n",
        "10": "",
        "11": None,
    }
    for thread, account in accounts.items():
        (tmp_path / thread).mkdir()
        if account is not None:
            (tmp_path / thread / "schedstat").write_text(account)
    account = CoreAccount(tmp_path, main=7)
    assert account.is_known
    assert account.times() == CoreTimes(main_queued=2.5, others_ran=4.0, others_queued=0.3)
    unknown = CoreAccount(tmp_path / "none")
    assert not unknown.is_known and unknown.times() == CoreTimes()


@pytest.mark.parametrize(("waited", "ran", "delay"), [(5.0, 0.0, 5.0), (5.0, 2.0, 3.0), (5.0, 9.0, 0.0)])
def test_what_own_threads_ran_is_no_delay(waited: float, ran: float, delay: float) -> None:
    before = CoreTimes(main_queued=1.0, others_ran=2.0, others_queued=3.0)
    after = CoreTimes(main_queued=1.0 + waited, others_ran=2.0 + ran, others_queued=7.0)
    assert after.since(before) == CoreTimes(main_queued=waited, others_ran=ran, others_queued=4.0)
    assert after.since(before).delay == delay


def computed(output: list[float], **gradients: list[float]) -> Computed:
    return Computed(
        output=torch.tensor(output), gradients={name: torch.tensor(value) for name, value in gradients.items()}
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("variant", "says"),
    [
        (computed([1, 2], w=[3.0]), ""),
        (computed([1, 2.1], w=[3.0]), "output"),
        (computed([1, float("nan")], w=[3.0]), "output"),
        (computed([1, 2], w=[3.1]), "gradient of w"),
        (computed([1, 2], w=[float("nan")]), "gradient of w"),
    ],
    ids=["equal", "output", "output NaN", "gradient", "gradient NaN"],
)
def test_a_difference_is_found(variant: Computed, says: str, exact: bool) -> None:
    found = difference(variant, computed([1, 2], w=[3.0]), exact=exact)
    assert says in found and bool(found) == bool(says)


def test_rounding_is_a_difference_only_where_bits_must_be_equal() -> None:
    variant, reference = computed([1 + 1e-6], w=[3 + 1e-6]), computed([1.0], w=[3.0])
    assert difference(variant, reference, exact=True)
    assert not difference(variant, reference, exact=False)


def test_a_zero_gradient_has_to_be_zero() -> None:
    assert difference(computed([1.0], w=[1e-9]), computed([1.0], w=[0.0]), exact=False)


def test_missing_gradients_are_a_difference() -> None:
    assert difference(computed([1.0]), computed([1.0], w=[1.0]), exact=True)
    assert difference(computed([1.0], other=[1.0]), computed([1.0], w=[1.0]), exact=False)


SHAPE = {"num_tokens": 640, "top_k": 2, "num_experts": 8, "num_ranks": 2}


@pytest.mark.parametrize("kind", ["balanced", "skewed"])
def test_experts_of_a_token_differ_and_stay_the_same_from_step_to_step(kind: str) -> None:
    chosen_TK = fixed_experts(kind, layer=3, **SHAPE)
    assert (chosen_TK[:, 0] != chosen_TK[:, 1]).all()
    assert torch.equal(chosen_TK, fixed_experts(kind, layer=3, **SHAPE))
    assert not torch.equal(chosen_TK, fixed_experts(kind, layer=4, **SHAPE))


def test_balanced_is_balanced_and_skewed_is_skewed() -> None:
    counts_E = torch.bincount(fixed_experts("balanced", layer=0, **SHAPE).reshape(-1), minlength=8)
    assert (counts_E == 160).all()
    share = (fixed_experts("skewed", layer=0, **SHAPE) < 4).float().mean()
    # Drawn without putting back, so the second expert of a token leans the other way.
    assert 0.5 + 0.5 * (SKEW / 2 - 0.5) < share <= SKEW / 2
    with pytest.raises(ValueError, match="balanced or skewed"):
        fixed_experts("even", layer=0, **SHAPE)


def test_the_routing_hook_keeps_the_weights() -> None:
    routing = Routing(
        logits_TE=torch.rand(6, 4), weights_TK=torch.rand(6, 2), experts_TK=torch.zeros(6, 2, dtype=torch.int64)
    )
    fixed = fixed_routing("balanced", 4, 2)(1, routing, False)
    assert fixed.weights_TK is routing.weights_TK
    assert torch.equal(
        fixed.experts_TK,
        fixed_experts("balanced", num_tokens=6, top_k=2, num_experts=4, num_ranks=2, layer=1),
    )
