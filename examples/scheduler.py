"""Which requests are read and which draw tokens, call by call: slots, chunks of prompts, ends.

Plain Python: it knows no model and no device. `serve.py` runs what it plans on an engine.
"""

import collections
import dataclasses
import heapq
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how it is to be continued.

    Attributes:
      name: what messages call it.
      prompt: tokens, at least one.
      new_tokens: the most tokens that are drawn.
      temperature, top_k, top_p: as `jla.models.generate` has them.
      stop: tokens that end it; the one that did is its last.
      seed: of the draws, an integer of 32 bits.
      arrival: seconds after the start.
    """

    name: str
    prompt: Sequence[int]
    new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[int, ...] = ()
    seed: int = 0
    arrival: float = 0.0


@dataclasses.dataclass(eq=False)
class Running:
    """A request on its way, and in the end its result.

    Attributes:
      slot: its row of the pool, which is another's once its last token is planned.
      read: how many tokens of the prompt are planned or read.
      planned: how many new tokens are planned or drawn.
      tokens: the new tokens that arrived.
      times: of each of them the seconds after the start.
      admitted: when it got a slot; None before.
      end: why it ended: "length", "stop", "cut off" or "not started"; None before.
    """

    request: Request
    slot: int | None = None
    read: int = 0
    planned: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    admitted: float | None = None
    end: str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A row of a prefill: the tokens `start` to `stop` of a prompt, which go to `slot`."""

    running: Running
    slot: int
    start: int
    stop: int

    @property
    def begins(self):
        """Whether the slot's former content is to be dropped first."""
        return self.start == 0

    @property
    def ends(self):
        """Whether the prompt ends here, so that the first new token is drawn."""
        return self.stop == len(self.running.request.prompt)

    @property
    def tokens(self):
        return self.running.request.prompt[self.start : self.stop]


class Scheduler:
    """Continuous batching: first come, first served.

    A call's plan counts as done once it is made. The host need not wait for a call's tokens before
    it plans the next: only stop tokens are then noticed late, and what was drawn behind one is
    dropped. A device runs calls in their order, so a slot is free for the next request as soon as
    the last token of the former is planned.

    Args:
      slots: how many requests run at once.
      rows: how many prompts a prefill reads.
      chunk: of each the most tokens; if they are packed, rows * chunk is the most of all together.
      steps: how many tokens a decoding call draws for each request.
      packed: whether a prefill's pieces lie one behind the other, and not in a row each.
    """

    def __init__(self, slots, rows, chunk, steps=1, packed=False):
        self.rows, self.chunk, self.steps, self.packed = rows, chunk, steps, packed
        self.free = list(range(slots))
        self.waiting = collections.deque()
        self.reading = []
        self.drawing = {}  # by slot
        self.unfinished = 0
        self.delivered = 0  # tokens
        self.dropped = 0  # tokens behind a stop token

    def submit(self, request):
        """Puts a request at the end of the queue; returns what becomes of it."""
        running = Running(request)
        self.waiting.append(running)
        self.unfinished += 1
        return running

    def plan_prefill(self, now):
        """The pieces of the next prefill; none if there is nothing to read."""
        while self.free and self.waiting and len(self.reading) < self.rows:
            running = self.waiting.popleft()
            running.slot, running.admitted = heapq.heappop(self.free), now
            self.reading.append(running)
        pieces, room = [], self.rows * self.chunk
        for running in self.reading[: self.rows]:
            start = running.read
            most = room if self.packed else self.chunk
            running.read = min(start + most, len(running.request.prompt))
            if running.read > start:
                pieces.append(Piece(running, running.slot, start, running.read))
            room -= running.read - start
        for piece in pieces:
            if piece.ends:
                self.reading.remove(piece.running)
                self.drawing[piece.slot] = piece.running
                self._plan(piece.running, 1)
        return pieces

    def plan_decode(self):
        """Pairs of a request and how many tokens it draws in the next call, by slot."""
        plan = {}
        for slot, running in sorted(self.drawing.items()):
            count = min(self.steps, running.request.new_tokens - running.planned)
            plan[slot] = running, count
            self._plan(running, count)
        return plan

    def _plan(self, running, count):
        running.planned += count
        if running.planned == running.request.new_tokens:
            self._release(running)

    def _release(self, running):
        if self.drawing.get(running.slot) is running:
            del self.drawing[running.slot]
            heapq.heappush(self.free, running.slot)

    def deliver(self, running, tokens, now):
        """Adds tokens that were drawn for a request, up to its end."""
        for token in tokens:
            if running.end is not None:
                self.dropped += 1
                continue
            running.tokens.append(int(token))
            running.times.append(now)
            self.delivered += 1
            if running.tokens[-1] in running.request.stop:
                running.end = "stop"
                self._release(running)
            elif len(running.tokens) == running.request.new_tokens:
                running.end = "length"
            self.unfinished -= running.end is not None

    def cut_off(self):
        """Ends all that are running or waiting; no more is planned."""
        for running in [*self.reading, *self.drawing.values()]:
            running.end = "cut off"
        for running in self.waiting:
            running.end = "not started"
        self.reading, self.drawing, self.unfinished = [], {}, 0
        self.waiting.clear()
