"""serve.py: its plans by a pretended engine, its tokens beside generate's, refusals, the end."""

import json
import logging
import os
import pathlib
import random
import signal
import sys
import types

import jax
import numpy as np
import pytest
from comparing import random_parameters
from programs import assert_fails

from jla.models import generate
from jla.models.generate import restrict

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import checkpoint
import latency
import serve
import workload
from model import make_model
from scheduler import Request, Running, Scheduler

pytestmark = pytest.mark.optax

SETTINGS = dict(new_tokens=6, temperature=0.0, top_k=None, top_p=None, stop=(), seed=5)


class Pretended:
    """An engine without a model: the next token is a function of the slot's content, as it is on a
    device where calls run in their order. It checks each plan."""

    def __init__(self, *model, slots, rows, chunk, steps=1, capacity=99, packed=False):
        self.slots, self.rows, self.steps = slots, rows, steps
        self.chunk, self.room = rows * chunk if packed else chunk, rows * chunk
        self.content, self.alive, self.most = {}, 0, 0
        self.state_bytes, self.compile_s = 1, 0.0

    def memory_bytes(self):
        return 1

    def prefill(self, pieces):
        assert 0 < len(pieces) <= self.rows
        assert sum(len(piece.tokens) for piece in pieces) <= self.room
        assert len({piece.slot for piece in pieces}) == len(pieces)
        drawn = np.full(self.rows, -1)
        for i, piece in enumerate(pieces):
            assert 0 <= piece.slot < self.slots and 0 < len(piece.tokens) <= self.chunk
            if piece.begins:
                self.content[piece.slot] = []
            assert len(self.content[piece.slot]) == piece.start
            self.content[piece.slot] += piece.tokens
            if piece.ends:
                drawn[i] = self.draw(piece.slot)
        return drawn

    def decode(self, counts):
        self.most = max(self.most, len(counts))
        drawn = np.full((self.steps, self.slots), -1)
        for slot, count in counts.items():
            assert 0 < count <= self.steps
            for i in range(count):
                drawn[i, slot] = self.draw(slot)
        return drawn

    def draw(self, slot):
        self.content[slot].append(next_token(self.content[slot]))
        return self.content[slot][-1]


def next_token(content):
    return (31 * sum(content) + 7 * len(content)) % 50


def alone(request):
    """A request's tokens by `next_token`."""
    content = list(request.prompt)
    for _ in range(request.new_tokens):
        content.append(next_token(content))
        if content[-1] in request.stop:
            break
    return content[len(request.prompt) :]


@pytest.mark.parametrize("steps, packed", [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize("slots, rows, chunk", [(1, 1, 2), (3, 2, 4), (8, 3, 5)])
def test_plans_give_each_request_its_own_tokens(slots, rows, chunk, steps, packed):
    draw = random.Random(0)
    requests = [
        Request(
            str(i),
            [draw.randrange(50) for _ in range(draw.randint(1, 12))],
            draw.randint(1, 9),
            stop=tuple(draw.sample(range(50), 3)),
            arrival=draw.random() / 50,
        )
        for i in range(40)
    ]
    sizes = dict(slots=slots, rows=rows, chunk=chunk, steps=steps, packed=packed)
    engine, scheduler = Pretended(**sizes), Scheduler(**sizes)
    became, _, calls = serve.serve(engine, scheduler, requests)
    assert [running.request for running in became] == requests
    assert [running.tokens for running in became] == [alone(request) for request in requests]
    for running in became:
        stopped = running.tokens[-1] in running.request.stop
        assert running.end == ("stop" if stopped else "length")
        assert running.times == sorted(running.times) and running.times[0] > running.admitted
    assert scheduler.dropped > 0 and scheduler.unfinished == 0
    assert sorted(scheduler.free) == list(range(slots)) and not scheduler.drawing
    unit = 1 if packed else chunk
    read = sum(-(-len(request.prompt) // unit) * unit for request in requests)
    assert calls["prefill"] >= read / (rows * chunk)
    assert engine.most > 1 or slots == 1


def test_a_slot_is_used_again_at_once():
    """The last token is planned, not yet known, when the next request gets the slot."""
    scheduler = Scheduler(1, 1, 4)
    first, second = (scheduler.submit(Request(name, [1, 2], 2)) for name in "ab")
    assert [piece.running for piece in scheduler.plan_prefill(0.0)] == [first]
    assert scheduler.plan_decode() == {0: (first, 1)}
    (piece,) = scheduler.plan_prefill(0.0)
    assert piece.running is second and piece.begins and piece.ends and first.tokens == []


def test_the_likeliest_of_a_row():
    shares = np.array([0.1, 0.4, 0.2, 0.3, 0.25, 0.25, 0.4, 0.1], np.float32).reshape(2, 4)
    run = jax.jit(lambda k, p: restrict(np.log(shares), k, p))

    def stays(k, p):
        finite = np.isfinite(run(np.array(k, np.int32), np.array(p, np.float32)))
        return [
            [f"{share:g}" for share in row[kept]] for row, kept in zip(shares, finite, strict=True)
        ]

    assert stays([4, 9], [1, 1]) == [["0.1", "0.4", "0.2", "0.3"], ["0.25", "0.25", "0.4", "0.1"]]
    assert stays([1, 1], [1, 1]) == [["0.4"], ["0.4"]]
    # Equal ones stay together.
    assert stays([3, 2], [1, 1]) == [["0.4", "0.2", "0.3"], ["0.25", "0.25", "0.4"]]
    assert stays([4, 4], [0.3, 0.5]) == [["0.4"], ["0.25", "0.25", "0.4"]]
    # The shares are those among the likeliest k: of two 4/7 and 3/7.
    assert stays([2, 4], [0.56, 0.66]) == [["0.4"], ["0.25", "0.25", "0.4"]]
    assert stays([2, 1], [0.58, 0.01]) == [["0.4", "0.3"], ["0.4"]]


def write_requests(path):
    """Good requests between bad ones: as (line, what is wrong)."""
    draw = np.random.default_rng(0)
    tokens = [draw.integers(256, size=size).tolist() for size in (1, 5, 8, 9, 21, 16, 2)]
    lines = [
        (dict(tokens=tokens[0]), None),
        (dict(tokens=[]), "the prompt is empty"),
        (dict(prompt=""), "the prompt is empty"),
        (dict(tokens=tokens[1], temperature=1.5, top_k=40, top_p=0.9), None),
        (dict(tokens=[3, 256]), "tokens must be integers from 0 to 255, the vocabulary, got 256"),
        (dict(tokens=[1] * 27), "its 27 tokens and 6 new ones are 33, and a slot holds 32"),
        (dict(tokens=tokens[2], temperature=0.7, top_k=20, top_p=0.8, seed=2**32 - 1), None),
        (dict(tokens=tokens[3], new_tokens=4), None),
        ("{", "it is no JSON"),
        ([], "it must be a JSON object, got list"),
        (dict(tokens=[1], length=3), "unknown: length; known: prompt, tokens, new_tokens"),
        (dict(tokens=tokens[4], temperature=2.0, top_k=250, top_p=1.0), None),
        (dict(tokens=[1], prompt="a"), 'it must have "prompt" or "tokens", and not both'),
        (dict(tokens="abc"), "tokens must be a list, got 'abc'"),
        (dict(prompt=3), "prompt must be text, got 3"),
        (dict(tokens=[1], temperature=-1), "temperature must be a number of at least 0, got -1"),
        (dict(tokens=[1], top_k=0), "top_k must be an integer of at least 1, got 0"),
        (dict(tokens=[1], top_p=1.5), "top_p must be a number above 0 and at most 1, got 1.5"),
        (dict(tokens=[1], seed=-1), "seed must be an integer from 0 to 4294967295, got -1"),
        (dict(tokens=[1], stop="a"), "stop must be a token or a list of tokens, got 'a'"),
        (dict(tokens=[1], stop=300), "stop must be integers from 0 to 255"),
        (dict(tokens=[1], new_tokens=1.5), "new_tokens must be an integer of at least 1, got 1.5"),
        (dict(tokens=tokens[5], new_tokens=1), None),
        (dict(tokens=tokens[6], stop=list(range(256))), None),
    ]
    text = (line if isinstance(line, str) else json.dumps(line) for line, _ in lines)
    path.write_text("\n".join(text) + "\n")
    return lines


TINY = dict(width=32, depth=1, heads=2)
POOL = "--new-tokens 6 --seed 5 --slots 3 --capacity 32 --rows 2 --chunk 8".split()


def tiny(mixer):
    model = make_model(mixer, **TINY, longest=32, implementation="reference")
    return model, random_parameters(model, np.zeros((1, 2), np.int32))["params"]


SLOW = [
    ("kda", "rows", 3),
    ("gsa", "packed", 1),
    ("log_linear", "packed", 1),
    ("mesa", "packed", 1),
    ("path", "rows", 1),
    ("attention", "rows", 1),
]


@pytest.mark.parametrize(
    "mixer, prefill, steps",
    [("kda", "packed", 1), *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]],
)
def test_tokens_are_those_of_generate(mixer, prefill, steps, tmp_path, capsys, monkeypatch, caplog):
    """Whatever runs beside, and without a third program; bad requests are refused one by one."""
    lines = write_requests(tmp_path / "requests.jsonl")
    out, compiled = tmp_path / "out.json", []
    model, params = tiny(mixer)

    class Engine(serve.Engine):
        def _compiled(self, *arguments):
            compiled.append(super()._compiled(*arguments))
            return compiled[-1]

    def watched(*arguments, **options):
        with jax.log_compiles(), caplog.at_level(logging.DEBUG):
            return serving(*arguments, **options)

    serving = serve.serve
    monkeypatch.setattr(serve, "load", lambda options: (model, params, []))
    monkeypatch.setattr(serve, "Engine", Engine)
    monkeypatch.setattr(serve, "serve", watched)
    prompts = str(tmp_path / "requests.jsonl")
    arguments = [*POOL, "--decode-steps", str(steps), "--prefill", prefill]
    serve.main([*arguments, "--prompts", prompts, "--json", str(out)])
    assert len(compiled) == 2
    assert [record for record in caplog.records if "ompil" in record.getMessage()] == []

    report = json.loads(out.read_text())
    assert report["prefill"] == prefill
    printed = capsys.readouterr().out
    for i, (_, reason) in enumerate(lines, 1):
        assert reason is None or f"{prompts}:{i} refused: {reason}" in printed
    good = [(i, line) for i, (line, reason) in enumerate(lines) if reason is None]
    assert report["refused"] == len(lines) - len(good) and "refused" in report["results"][-1]
    results = report["results"][: len(good)]
    assert [result["name"] for result in results] == [f"{prompts}:{i + 1}" for i, _ in good]
    ends = ["length"] * (len(good) - 1) + ["stop"]
    assert [result["end"] for result in results] == ends
    # Of the two calls that were started before the first token, a stop token, was read.
    assert report["dropped_tokens"] == min(2 * steps, 5)
    assert report["new_tokens"] == 6 * 4 + 4 + 1 + 1
    for (i, line), result in zip(good, results, strict=True):
        expected = generated(model, params, line["tokens"], i, line)
        wanted = 1 if "stop" in line else line.get("new_tokens", 6)
        assert result["tokens"] == expected[:wanted], (line, result)


def generated(model, params, tokens, i, line):
    """What `generate` has for a request: of 6 tokens, and one shape, for it compiles for each."""
    padded, mask = np.zeros((1, 21), np.int32), np.zeros((1, 21), bool)
    padded[0, : len(tokens)], mask[0, : len(tokens)] = tokens, True
    options = {}
    if line.get("temperature"):
        seed = line.get("seed", 5 + i)
        options = {name: line[name] for name in ("temperature", "top_k", "top_p")}
        options |= dict(key=jax.random.key(np.uint32(seed)))
    new = generate(model, params, padded, mask=mask, max_new_tokens=6, **options)
    return np.asarray(new[0]).tolist()


def test_ctrl_c_ends_in_good_order(tmp_path, monkeypatch, capsys):
    """The running request is cut off, and what there is of it is reported."""
    out = tmp_path / "out.json"

    class Engine(Pretended):
        def decode(self, counts):
            if len(self.content[0]) == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return super().decode(counts)

    monkeypatch.setattr(serve, "Engine", Engine)
    monkeypatch.setattr(serve, "load", lambda options: (make_model("kda", **TINY), {}, []))
    arguments = "--slots 1 --synthetic 3 --prompt-length 2:5 --json".split()
    with pytest.raises(SystemExit) as exit:
        serve.main([*arguments, str(out)])
    assert exit.value.code == 128 + signal.SIGINT
    captured = capsys.readouterr()
    assert captured.err == "serve.py: stopped; what was running is cut off\n"
    assert "1 cut off, 2 not started" in captured.out and "0/3 requests" in captured.out
    report = json.loads(out.read_text())
    first, *others = report["results"]
    assert len(first["tokens"]) == 21 - first["prompt_tokens"] == report["new_tokens"]
    assert [other["tokens"] for other in others] == [[], []]
    assert [result["end"] for result in report["results"]] == ["cut off", *["not started"] * 2]


def test_a_second_ctrl_c_ends_at_once(monkeypatch, capsys):
    class Engine(Pretended):
        def decode(self, counts):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")

    monkeypatch.setattr(serve, "Engine", Engine)
    monkeypatch.setattr(serve, "load", lambda options: (make_model("kda", **TINY), {}, []))
    assert_fails(capsys, 128 + signal.SIGINT, "serve.py: interrupted", serve.main)


def test_the_numbers_of_a_run():
    def running(arrival, times, end):
        request = Request("", [1, 2, 3], len(times), arrival=arrival)
        return Running(request, 0, 3, len(times), [7] * len(times), times, arrival + 0.5, end)

    found = [
        running(0.0, [1.0, 1.5, 1.5, 2.5], "length"),
        running(2.0, [2.5, 2.6], "stop"),
        Running(Request("", [1], 1), end="cut off"),
    ]
    numbers = latency.summary(found, 4.0, refused=2)
    assert numbers["requests"] == 5 and numbers["refused"] == 2
    assert [numbers[end] for end in ("length", "stop", "cut_off")] == [1, 1, 1]
    assert numbers["new_tokens_per_s"] == 6 / 4 and numbers["prompt_tokens_per_s"] == 6 / 4
    assert numbers["queue_s"] == dict(median=0.5, p99=0.5)
    assert numbers["first_token_s"]["median"] == 0.75 and numbers["reading_s"]["median"] == 0.25
    assert numbers["between_tokens_s"]["median"] == pytest.approx(0.5)
    first = next(latency.lines(numbers))
    assert first.endswith("1 finished, 1 ended by a stop token, 1 cut off, 2 refused")
    nothing = latency.summary([], 1.0)
    assert nothing["first_token_s"] == dict(median=None, p99=None)
    assert "none" in next(latency.lines(nothing))


def test_random_requests():
    options = dict(rate=4.0, lengths=(10, 400), vocabulary=50, settings=SETTINGS)
    requests = workload.synthetic(100, **options)
    assert requests[7].prompt == workload.synthetic(100, **options)[7].prompt
    lengths = [len(request.prompt) for request in requests]
    assert 10 <= min(lengths) < 20 and 390 < max(lengths) <= 400
    assert np.mean(lengths) == pytest.approx(205, rel=0.1)
    assert requests[-1].arrival == pytest.approx(25, rel=0.2)
    assert [r.seed for r in requests[:3]] == [5, 6, 7]
    assert {workload.reason_to_refuse(r, 50, 406) for r in requests} == {None}
    at_once = workload.synthetic(3, **options | dict(rate=None))
    assert [r.arrival for r in at_once] == [0.0] * 3


def test_mistakes(tmp_path, capsys):
    main, empty = serve.main, tmp_path / "empty"
    empty.write_text("")
    assert_fails(capsys, 2, "--step is of --run", main, "--step", 3)
    assert_fails(
        capsys, 2, "--prompt-length: must be like 100:4000", main, "--prompt-length", "9:3"
    )
    assert_fails(capsys, 2, "not allowed with argument", main, "--run", "a", "--checkpoint", "b")
    with pytest.raises(workload.InputError, match=r"--prefill packed: .* use --prefill rows"):
        serve.packs_prompts(serve.parse(["--prefill", "packed"]), make_model("path", **TINY))
    assert_fails(capsys, 1, "no checkpoint in nowhere", main, "--run", "nowhere")
    assert_fails(
        capsys, 1, "--json nowhere/x: there is no such folder", main, "--json", "nowhere/x"
    )
    for path, words in ((empty, "is empty"), ("missing", "cannot read the prompts missing")):
        with pytest.raises(workload.InputError, match=words):
            workload.read([path], str.encode, SETTINGS)


def test_models_of_runs_and_of_checkpoints(tmp_path):
    model, params = tiny("kda")
    settings = dict(mixer="kda", **TINY, dtype="float32")
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, 3, dict(params=params), dict(model=settings, training={}))
    arguments = ["--implementation", "reference", "--run", str(tmp_path)]
    loaded, same, ends = serve.load(serve.parse(arguments))
    assert loaded == make_model(**settings, implementation="reference") and ends == []
    jax.tree.map(np.testing.assert_array_equal, same, params)
    folder = str(pathlib.Path(__file__).parent / "hub" / "models" / "fla_kda")
    model, params, ends = serve.load(serve.parse(["--checkpoint", folder, "--dtype", "bfloat16"]))
    assert params["embed"]["embedding"].shape[0] == model.config.vocabulary
    assert model.dtype == "bfloat16" and ends == [json.loads(read(folder))["eos_token_id"]]


def test_text_goes_through_the_tokenizer(monkeypatch):
    class Words:
        words = ("a", "rose", "is")
        from_pretrained = classmethod(lambda cls, folder, **options: cls())

        def encode(self, text):
            return [self.words.index(word) for word in text.split()]

        def decode(self, tokens):
            return " ".join(self.words[token] for token in tokens)

    module = types.SimpleNamespace(AutoTokenizer=Words)
    monkeypatch.setitem(sys.modules, "transformers", module)
    options = serve.parse(["--checkpoint", "x", "--tokenizer", "--prompts", "y"])
    encode, decode = serve.coding_of(options, 3, None)
    assert encode("a rose is") == [0, 1, 2] and decode(np.array([1, 0])) == "rose a"
    encode, decode = serve.coding_of(serve.parse(["--run", "x"]), 256, None)
    assert list(encode("ab")) == [97, 98] and decode(np.array([98])) == "b"


def read(folder):
    return (pathlib.Path(folder) / "config.json").read_text()
