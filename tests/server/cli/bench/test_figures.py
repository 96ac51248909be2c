from __future__ import annotations

import pytest

from server.cli.bench.figures import Round, against_best, paired_ratio, summary


def _round(seconds: float, *streams: list[float]) -> Round:
    return Round(seconds=seconds, streams=streams, num_tokens=sum(map(len, streams)))


def _rate(found: Round) -> float:
    return found.tokens_per_s


def test_round_counts_rate_first_tokens_and_gaps() -> None:
    found = _round(2.0, [0.5, 1.0, 2.0], [0.25])
    assert found.tokens_per_s == 2.0
    assert found.first_token_s == [0.5, 0.25]
    assert found.gaps_s == [0.5, 1.0]


def test_rounds_at_once_take_the_longest_and_others_the_sum() -> None:
    rounds = [_round(2.0, [1.0, 2.0]), _round(4.0, [4.0, 4.0])]
    assert Round.merged(rounds, at_once=True).tokens_per_s == 1.0
    assert Round.merged(rounds, at_once=False).tokens_per_s == pytest.approx(4 / 6)


def test_summary_takes_the_median_rate_and_percentiles_of_all_tokens() -> None:
    rounds = [_round(1.0, [0.1, 0.2]), _round(2.0, [0.3, 0.4]), _round(0.5, [0.2, 0.3])]
    found = summary(rounds)
    assert found["tokens_per_s"] == 2.0
    assert found["rates"] == [2.0, 1.0, 4.0]
    assert found["ttft_ms"]["p50"] == pytest.approx(200)
    assert found["itl_ms"]["p99"] == pytest.approx(100)


def test_summary_of_one_token_has_no_gaps() -> None:
    assert "itl_ms" not in summary([_round(1.0, [0.5])])


def test_paired_ratio_is_the_median_of_ratios_round_by_round() -> None:
    ours = [_round(1.0, [1.0]), _round(2.0, [2.0]), _round(4.0, [4.0])]
    theirs = [_round(2.0, [2.0]), _round(2.0, [2.0]), _round(40.0, [9.0])]
    assert paired_ratio(ours, theirs, of=_rate) == 2.0


def test_best_peer_is_the_one_with_the_greatest_median_rate() -> None:
    ours = [_round(1.0, [1.0])]
    peers = {"slow": [_round(4.0, [4.0])], "fast": [_round(0.5, [0.5])]}
    found = against_best(ours, peers)
    assert (found["best_peer"], found["ratio"]) == ("fast", 0.5)
    assert found["ratios"] == {"slow": 4.0, "fast": 0.5}


def test_without_peers_there_is_no_ratio() -> None:
    assert against_best([_round(1.0, [1.0])], {})["ratio"] is None
