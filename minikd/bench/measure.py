"""The clock: how often a call is repeated, in which order contenders take turns, and what is kept of the samples."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]  # nanoseconds for one of so many calls in a row

SAMPLE_NS = 200_000  # a sample takes at least this long: tiny calls are repeated within one
BATCH_NS = 2_000_000  # a contender's turn takes about this long …
MOST_IN_BATCH = 5  # … or so many samples
WARM_UP_NS = 20_000_000  # slower calls get no untimed call at the start of a turn: caches do not outlive them anyway
LEAST_ROUNDS = 9
REST_SECONDS = 0.002  # until a thread pool has stopped spinning


class Effort(NamedTuple):
    """At most this many rounds, and no new one after so many seconds, but never fewer than LEAST_ROUNDS."""

    rounds: int
    seconds: float


class Turn(NamedTuple):
    """One contender's turn in a round: an untimed call if `warm`, then `samples` times `calls` calls."""

    calls: int
    samples: int
    warm: bool


class Timing(NamedTuple):
    """The samples of one contender, in nanoseconds for one call."""

    samples: list[float]
    calls: int

    def figures(self) -> dict[str, Any]:
        """Median, minimum and the distance between the quartiles."""
        low, median, high = np.percentile(self.samples, [25, 50, 75])
        return {
            "median_ns": float(median),
            "min_ns": float(min(self.samples)),
            "iqr_ns": float(high - low),
            "samples": len(self.samples),
            "calls_per_sample": self.calls,
        }


def sample(call: Call, calls: int) -> float:
    """Nanoseconds for one of `calls` calls in a row."""
    turns = range(calls)
    began = time.perf_counter_ns()
    for _ in turns:
        call()
    return (time.perf_counter_ns() - began) / calls


def calibrate(call: Call, clock: Clock = sample) -> Turn:
    """How often to call, so that a sample lasts SAMPLE_NS and a turn about BATCH_NS."""
    calls, once = 1, clock(call, 1)
    while once * calls < SAMPLE_NS:
        calls = max(2 * calls, min(int(SAMPLE_NS / max(once, 1.0)), 10 * calls))
        once = clock(call, calls)
    samples = int(BATCH_NS / (once * calls))
    return Turn(calls, min(max(samples, 1), MOST_IN_BATCH), once < WARM_UP_NS)


def interleave(
    calls: Mapping[str, Call], effort: Effort, rest: bool = False, clocks: Mapping[str, Clock] | None = None
) -> dict[str, Timing]:
    """Time all contenders in rounds, so that whatever slows the machine down slows all of them.

    Each round starts with another contender, and every second one runs backwards, so that nobody always follows the
    same one. `rest` waits before each turn for the thread pool of the contender before to go to sleep.
    `clocks` are those of contenders whose work is not done when their call comes back.
    """
    clock_of = {name: (clocks or {}).get(name, sample) for name in calls}
    turns = {name: calibrate(call, clock_of[name]) for name, call in calls.items()}
    timings = {name: Timing([], turn.calls) for name, turn in turns.items()}
    names, began = list(calls), time.monotonic()
    gc.collect()
    gc.disable()
    try:
        for number in range(max(effort.rounds, LEAST_ROUNDS)):
            if number >= LEAST_ROUNDS and time.monotonic() - began > effort.seconds:
                break
            for name in order(names, number):
                if rest:
                    time.sleep(REST_SECONDS)
                if turns[name].warm:
                    calls[name]()
                for _ in range(turns[name].samples):
                    timings[name].samples.append(clock_of[name](calls[name], turns[name].calls))
    finally:
        gc.enable()
    return timings


def order(names: list[str], number: int) -> list[str]:
    """The names rotated by the round's number, backwards in every second round."""
    first = number % len(names) if names else 0
    turned = names[first:] + names[:first]
    return turned[::-1] if number % 2 else turned
