"""How benchmarks.quality reads its text and runs the steps of training."""

import statistics
import time

import numpy as np

KNOWN = 4  # groups after which a run knows how long it takes, the first apart


class Training:
    """Steps enqueued in groups, of which one is awaited while the next is there to be run.

    Attributes:
      params: after the steps that are enqueued.
      losses, ms: of the groups that were awaited, the mean loss and the milliseconds of a step.
      seconds: of all these groups.
    """

    def __init__(self, run, state, rates):
        self.run, self.state, self.rates = run, state, rates
        self.losses, self.ms, self.seconds = [], [], 0.0
        self.steps, self.waiting, self.since = 0, [], None

    @property
    def params(self):
        return self.state["params"]

    def enqueue(self, batches):
        """Has a step run on each of these, and awaits those of the call before."""
        if self.since is None:
            self.since = time.perf_counter()
        group = []
        for tokens in batches:
            moments, _ = self.state["moments"]
            state = self.state | dict(moments=(moments, self.rates[self.steps]))
            self.state, loss, _ = self.run(state, tokens)
            group.append(loss)
            self.steps += 1
        self._await()
        self.waiting = group

    def finish(self):
        """Awaits all; the time until the next call does not count."""
        self._await()
        self.since = None

    def left(self):
        """Seconds that all other steps will take, once that is known."""
        known = self.ms[1:]
        steps = len(self.rates) - self.steps + len(self.waiting)
        return steps * statistics.median(known) / 1e3 if len(known) >= KNOWN else 0.0

    def _await(self):
        if not self.waiting:
            return
        self.losses.append(statistics.mean(map(float, self.waiting)))
        now = time.perf_counter()
        self.ms.append(1e3 * (now - self.since) / len(self.waiting))
        self.seconds += now - self.since
        self.since, self.waiting = now, []


class Batches:
    """The batches of one reading, int32 [batch, length + 1]: windows of a text in random order."""

    def __init__(self, text, seed, batch, length):
        self.text, self.batch, self.length = text, batch, length
        self.order = np.random.default_rng(seed).permutation((len(text) - 1) // length)

    def __getitem__(self, step):
        chosen = self.order[step * self.batch : (step + 1) * self.batch]
        return cut(self.text, chosen, self.length)


def cut(text, windows, length):
    """The windows of these numbers, int32 [N, length + 1]; each one's last token is the next's
    first."""
    return text[windows[:, None] * length + np.arange(length + 1)].astype(np.int32)
