"""The harness takes turns, repeats short calls and compares round by round; a fake clock stands in for the machine."""

import pytest
import torch

from vidkern.bench import harness, overhead


class FakeTimer:
    """Each call "takes" what its function returns, times the machine's speed in that round."""

    def __init__(self, slow=()):
        self.log, self.slow = [], dict(slow)

    def __call__(self, call, repeats):
        name, seconds = call()
        self.log.append((name, repeats))
        return seconds * self.slow.get(len(self.log), 1)


def candidate(name, seconds, repeats=1):
    return harness.Candidate(name, lambda: (name, seconds), repeats)


def test_every_round_runs_every_candidate_once_and_rotates_the_start():
    timer, ticks = FakeTimer(), []
    found = harness.interleave([candidate(n, 1.0) for n in "abc"], 3, timer, lambda: ticks.append(1))
    assert "".join(name for name, _ in timer.log) == "abc" + "bca" + "cab"
    assert {k: len(v) for k, v in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert len(ticks) == 9


def test_ratio_is_taken_within_rounds():
    # The whole second round is ten times slower: the ratio of medians over rounds would notice, the ratio by round not.
    timer = FakeTimer({3: 10, 4: 10})
    found = harness.interleave([candidate("ours", 1.0), candidate("peer", 3.0)], 3, timer)
    assert found["ours"] == [1, 10, 1] and found["peer"] == [3, 30, 3]
    assert harness.ratio(found["peer"], found["ours"]) == 3


def test_ratio_needs_as_many_samples_on_both_sides():
    with pytest.raises(ValueError):
        harness.ratio([1.0, 2.0], [1.0])


def test_summary():
    assert harness.summary([4.0, 1.0, 3.0, 2.0, 10.0]) == {"median": 3.0, "min": 1.0, "iqr": 2.0}
    assert harness.summary([2.0]) == {"median": 2.0, "min": 2.0, "iqr": 0}


def test_short_calls_are_repeated_and_long_ones_are_not():
    short, long = candidate("short", 1e-5), candidate("long", 0.5)
    seconds = harness.choose_repeats([short, long], FakeTimer(), sample_seconds=1e-3)
    assert (short.repeats, long.repeats) == (100, 1)
    assert seconds == {"short": 1e-5, "long": 0.5}


def test_overhead_is_measured_above_the_first_call():
    calls = {"launcher": lambda: ("launcher", 2e-6), "op": lambda: ("op", 5e-6)}
    rows = overhead.measure(calls, FakeTimer(), rounds=3)
    assert [r["name"] for r in rows] == ["launcher", "op"]
    assert rows[0]["above_launcher"] == 0
    assert rows[1]["above_launcher"] == pytest.approx(3.0)
    assert overhead.measure({}, FakeTimer()) == []


def test_cpu_timer_divides_by_the_repeats():
    calls = []
    assert 0 <= harness.cpu_timer(lambda: calls.append(1), 50) < 0.01
    assert len(calls) == 50


@pytest.mark.skipif(not harness.Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_counts_what_was_freed_again_and_what_is_returned():
    def call():
        passing = torch.ones(24 << 20)  # 96 MiB, freed before the result is made
        del passing
        return torch.ones(8 << 20)

    call()
    found = harness.peak_extra_memory(call, "cpu")
    assert 90 < found / 2**20 < 120
