"""What a run of `serve.py` took: speed, waiting times, their medians and 99th percentiles."""

import itertools

import numpy as np


def summary(finished, seconds, *, refused=0):
    """The numbers of a run as a dict; None for what has no number.

    Tokens count when the host has them. "queue" is the wait for a slot, "reading" from there to the
    first token, "first_token" both. "between_tokens" are the waits between two such moments of
    one request: with several tokens in a decoding call they arrive together, and a wait is that for
    all of them.

    Args:
      finished: `scheduler.Running`, all that were submitted.
      seconds: what the run took, without compiling.
      refused: how many requests were not submitted.
    """
    ends = [running.end for running in finished]
    kinds = ("length", "stop", "cut_off", "not_started")
    read = sum(running.read for running in finished)
    drawn = sum(len(running.tokens) for running in finished)
    started = [running for running in finished if running.times]
    gaps = []
    for running in started:
        moments = sorted(set(running.times))
        gaps += [after - before for before, after in itertools.pairwise(moments)]
    return dict(
        requests=len(finished) + refused,
        **{name: ends.count(name.replace("_", " ")) for name in kinds},
        refused=refused,
        seconds=seconds,
        prompt_tokens=read,
        new_tokens=drawn,
        prompt_tokens_per_s=read / seconds,
        new_tokens_per_s=drawn / seconds,
        queue_s=spread(r.admitted - r.request.arrival for r in finished if r.admitted is not None),
        reading_s=spread(r.times[0] - r.admitted for r in started),
        first_token_s=spread(r.times[0] - r.request.arrival for r in started),
        between_tokens_s=spread(gaps),
    )


def spread(values):
    """The median and the 99th percentile; None of no values."""
    values = list(values)
    if not values:
        return dict(median=None, p99=None)
    median, p99 = np.percentile(values, [50, 99])
    return dict(median=float(median), p99=float(p99))


def lines(summary):
    """The summary in words."""
    ends = dict(
        length="finished",
        stop="ended by a stop token",
        cut_off="cut off",
        not_started="not started",
        refused="refused",
    )
    counts = [f"{summary[name]:,} {words}" for name, words in ends.items() if summary[name]]
    yield f"requests         {', '.join(counts) or 'none'}"
    yield (
        f"throughput       {summary['new_tokens_per_s']:,.1f} new tokens/s and "
        f"{summary['prompt_tokens_per_s']:,.1f} prompt tokens/s, in {summary['seconds']:.2f} s"
    )
    titles = dict(
        queue_s="in the queue", first_token_s="to first token", between_tokens_s="between tokens"
    )
    for name, title in titles.items():
        median, p99 = (summary[name][of] for of in ("median", "p99"))
        if median is not None:
            yield f"{title:<16} median {1e3 * median:,.1f} ms, p99 {1e3 * p99:,.1f} ms"
