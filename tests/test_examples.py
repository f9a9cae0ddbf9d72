"""The examples: a small run from end to end, resuming, sampling, and what they say of mistakes."""

import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import sys
import time

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from comparing import random_parameters
from programs import assert_fails

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import checkpoint
import command_line
import generate
import train_lm
from model import MIXERS, make_model

pytestmark = [pytest.mark.optax, pytest.mark.usefixtures("begun_by_numpy")]

# The reference compiles in a fraction of the chunked implementation's time; a short text is quickly
# evaluated.
TEXT = ["--text", str(pathlib.Path(__file__).parents[1] / "LICENSE")]
TINY = (
    "--width 32 --depth 1 --heads 2 --length 16 --batch 2 --steps 4 --sample-length 20 "
    "--implementation reference"
).split() + TEXT
EVERY_TWO = ["--save-every", "2", "--evaluate-every", "2"]


def train(*arguments):
    train_lm.main([*TINY, *EVERY_TWO, *map(str, arguments)])


def load_state(out, step):
    manager = checkpoint.open_manager(out, read_only=True)
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


# Not of the module: pytest-xdist sends a process its tests in parts, and ends the module with each.
@pytest.fixture(scope="session")
def trained(tmp_path_factory, begun_by_numpy):
    """A finished run of four steps, with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("run")
    train("--out", out)
    return out


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def no_report(monkeypatch):
    """Runs end with their last step: most of a resumed run's time is that of its report."""
    monkeypatch.setattr(train_lm, "report", lambda *arguments: None)


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_training_writes_what_it_promises(trained):
    lines = metrics(trained)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out_bits_per_byte" in line] == [2, 4]
    # The rate of each step: none at first, then the peak, then a cosine's thirds of the way down.
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == pytest.approx([0, 4e-3, 4e-3 * 0.7625, 4e-3 * 0.2875], rel=1e-5)
    first = lines[0]["loss"]
    assert first == pytest.approx(math.log(256), rel=0.05)  # an untrained model knows nothing
    assert lines[-1]["held_out_bits_per_byte"] < 8.0
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_is_the_uninterrupted_one(trained, copy, no_report, capsys):
    shutil.rmtree(copy / "checkpoints" / "4")
    train("--out", copy, "--resume")
    assert "resumed from step 2" in capsys.readouterr().out
    assert_same_run(copy, trained)


def assert_same_run(out, other):
    """The last state and all metrics but the speeds are the same."""
    chex.assert_trees_all_equal(load_state(out, 4), load_state(other, 4))
    first, second = (
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics(run)]
        for run in (out, other)
    )
    assert first == second


@pytest.mark.parametrize(
    ("number", "arguments", "words"),
    [
        (signal.SIGINT, [], "the same command with --resume goes on"),
        (signal.SIGTERM, ["--overwrite"], "--resume in place of --overwrite"),
    ],
)
def test_a_signal_ends_a_run_that_can_be_resumed(
    number, arguments, words, trained, tmp_path, monkeypatch, no_report, capsys
):
    def batch_at(text, step, **options):
        if step == 3:
            os.kill(os.getpid(), number)
        return text_batch_at(text, step, **options)

    text_batch_at = train_lm.batch_at
    monkeypatch.setattr(train_lm, "batch_at", batch_at)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    words = f"train_lm.py: stopped after step 3 saved {words}"
    call = [train_lm.main, *TINY, *EVERY_TWO, "--out", tmp_path, *arguments]
    assert_fails(capsys, 128 + number, words, *call)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [1, 2, 3]
    monkeypatch.undo()
    monkeypatch.setattr(train_lm, "report", lambda *arguments: None)
    train("--out", tmp_path, "--resume")
    assert_same_run(tmp_path, trained)


def test_the_second_signal_does_what_it_did():
    with command_line.stop_requests() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)


def test_an_ignored_signal_stays_ignored():
    """As in a shell's background job, which the Ctrl-C of another job reaches, too."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with command_line.stop_requests() as received:
            os.kill(os.getpid(), signal.SIGINT)
        assert received == []
    finally:
        signal.signal(signal.SIGINT, former)


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path, monkeypatch, capsys):
    def load_text(paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_lm, "load_text", load_text)
    assert_fails(capsys, 130, "train_lm.py: interrupted", train_lm.main, "--out", tmp_path)


def test_a_finished_run_is_continued(trained, copy, monkeypatch, no_report, capsys):
    """What is not given is as the checkpoint has it; the schedule is that of all the steps."""

    def run(model, optimizer, rate, state, first_step, options, *rest):
        calls.append((first_step, options.steps, options.batch, options.width, options.seed))
        wanted = jax.tree.leaves(load_state(trained, 4))
        chex.assert_trees_all_equal(jax.tree.leaves(state), wanted)
        assert float(rate(1)) == pytest.approx(0.5)
        assert float(rate(6)) == pytest.approx(0.05 * 0.5)
        return state

    calls = []
    monkeypatch.setattr(train_lm, "train", run)
    arguments = ["--resume", "--steps", "6", "--lr", "0.5", "--batch", "8", "--out", str(copy)]
    train_lm.main([*arguments, *TEXT, "--implementation", "reference"])
    assert calls == [(4, 6, 8, 32, 0)]
    out = capsys.readouterr().out
    assert "from here on with other settings: --steps (4, now 6), --batch (2, now 8), --lr" in out


def test_two_runs_cannot_use_one_folder(copy, capsys):
    with command_line.locked(copy):
        for options in (["--resume"], ["--overwrite"]):
            words = f"another run is writing to {copy}"
            assert_fails(capsys, 1, words, train_lm.main, *TINY, "--out", copy, *options)
    with command_line.locked(copy):  # what is closed, or its process dead, holds nothing
        pass


def test_wrong_options_change_nothing(copy, capsys):
    before = contents(copy)
    other = [*TINY, "--out", copy, "--width", "16"]
    assert_fails(capsys, 1, "cannot build", train_lm.main, *other, "--overwrite")
    assert_fails(capsys, 1, "--width (32, now 16)", train_lm.main, *other, "--resume")
    assert_fails(capsys, 1, "already --resume", train_lm.main, *other)
    assert contents(copy) == before


def test_a_run_that_failed_before_its_first_checkpoint_is_none(copy, capsys):
    for path in (copy / "checkpoints").iterdir():
        shutil.rmtree(path)
    # Not that the folder holds a run.
    other = [*TINY, "--out", copy, "--width", "16"]
    assert_fails(capsys, 1, "cannot build", train_lm.main, *other)


def test_help_has_the_defaults(capsys):
    for program, defaults in (
        (train_lm, vars(train_lm.parse([]))),
        (generate, vars(generate.parse(["--checkpoint", "."])) | dict(checkpoint=None)),
    ):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        text = " ".join(capsys.readouterr().out.split("options:")[1].split())
        help = dict(re.findall(r"--([a-z-]+) (.*?)(?= --[a-z-]+ |$)", text))
        for name, value in defaults.items():
            if value is not None and value is not False and name != "given":
                assert str(value).strip() in help[name.replace("_", "-")].split("(default: ")[1]


def test_the_metrics_of_a_saved_step_are_complete(tmp_path, monkeypatch):
    """A run that dies while it evaluates has not saved the step: a resumed one evaluates again."""
    monkeypatch.setattr(train_lm, "evaluate", lambda *arguments, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("--out", tmp_path)
    assert not checkpoint.holds_checkpoint(tmp_path)


def test_metrics_are_cut_where_a_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3)]
    path.write_text("".join(lines) + '{"step": 2, "lo')  # the disk was full
    assert len(train_lm.Metrics(path, 5).lines) == 3 and path.read_text() == "".join(lines)
    assert train_lm.Metrics(path, 2).lines == [{"step": 1}, {"step": 2}]
    assert path.read_text() == "".join(lines[:2])
    path.write_text("nonsense\n" + lines[0])
    with pytest.raises(command_line.InputError, match=r"metrics.jsonl: line 1 is damaged"):
        train_lm.Metrics(path, 2)
    assert train_lm.Metrics(path, 0).lines == [] and path.read_text() == ""


def test_metrics_that_cannot_be_written_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(command_line.InputError, match=r"metrics.jsonl: No space left on device"):
        train_lm.Metrics(path, 0).write(step=1)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_cannot_be_written_is_named(copy, no_report, capfd, caplog):
    """A limit of file size fails as a full disk does, behind orbax's first files."""
    shutil.rmtree(copy / "checkpoints" / "4")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        words = "cannot write checkpoints/4 File too large last one is of step 2"
        call = [train_lm.main, *TINY, *EVERY_TWO, "--resume", "--out", copy]
        assert_fails(capfd, 1, words, *call)
        assert caplog.records == []  # orbax's, with tracebacks
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["2"]
    train("--resume", "--out", copy)
    assert checkpoint.find_step(copy, flag="--resume") == 4


def test_what_a_killed_process_left_is_deleted(tmp_path):
    left = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp" / "state"
    left.mkdir(parents=True)
    checkpoint.open_manager(tmp_path, read_only=True)  # as generate.py does, beside a run
    assert left.exists()
    checkpoint.open_manager(tmp_path)  # in a thread, which the first save waits for
    for _ in range(100):
        if left.parent.exists():
            time.sleep(0.05)
    assert not left.parent.exists()


def test_generate_continues_the_prompt(trained, capsys):
    def run(*arguments):
        generate.main(
            ["--checkpoint", str(trained), "--prompt", "The", "--length", "30", *arguments]
        )
        return capsys.readouterr().out

    assert run().startswith("The")
    drawn = run("--seed", "1")
    assert drawn == run("--seed", "1") != run("--seed", "2")
    greedy = run("--temperature", "0", "--seed", "1")
    assert drawn != greedy == run("--temperature", "0", "--seed", "2")


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param(None, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "mixer",
    [
        # The layers' tests have all of them, and `trained` ends with this comparison for kda.
        pytest.param(name, marks=() if name in ("path", "attention") else pytest.mark.slow)
        for name in MIXERS
    ],
)
def test_decoding_is_the_forward(mixer, implementation):
    model = make_model(mixer, width=32, depth=2, heads=2, implementation=implementation)
    prompt = jax.random.randint(jax.random.key(0), (2, 5), 0, 256)
    params = random_parameters(model, prompt)["params"]
    tokens, logits = generate.sample(model, params, prompt, jax.random.key(2), 1.0, length=12)
    distance = train_lm.check_decoding(model, params, prompt, tokens, logits, length=16)
    assert distance < 1e-4
    with pytest.raises(RuntimeError, match="disagree"):
        wrong = logits.at[1, 3].add(0.1 * jnp.abs(logits).max())
        train_lm.check_decoding(model, params, prompt, tokens, wrong, length=16)


@pytest.mark.parametrize(
    ("mixer", "others"),
    [
        ("kda", {"bias", "A_log", "dt_bias"}),
        ("log_linear", {"A_log", "dt_bias", "D", "L"}),
        ("mesa", {"bias", "lambda_params"}),
    ],
)
def test_weight_decay_spares_norms_biases_and_gates(mixer, others):
    tokens = jnp.zeros((1, 2), jnp.int32)
    model = make_model(mixer, width=32, depth=1, heads=2)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    marked = jax.tree_util.tree_leaves_with_path(train_lm.decays(params))
    spared = {path[-1].key for path, decayed in marked if not decayed}
    decayed = {path[-1].key for path, decayed in marked if decayed}
    assert spared == {"scale"} | others
    assert decayed == {"kernel", "embedding"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--steps 0", "--steps integer >= 1 '0'"),
        ("--lr nan", "--lr number > 0 'nan'"),
        ("--width 30 --heads 4", "--width 30 --heads 4 multiple"),
        ("--mixer lstm", "--mixer 'lstm' kda attention"),
        ("--mixer attention --implementation xla", "--implementation attention"),
        ("--resume --overwrite", "--overwrite not allowed --resume"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    assert_fails(capsys, 2, words, train_lm.main, *arguments.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read No such file"), (b"", "empty"), (b"short", "5 bytes at least 2570")],
)
def test_bad_texts_are_named(content, words, capsys, tmp_path):
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    assert_fails(capsys, 1, words, train_lm.main, "--text", path, "--out", tmp_path / "out")


def test_a_model_that_cannot_be_built_is_explained(capsys, tmp_path):
    options = ("--out", tmp_path, "--width", 16, "--heads", 2)
    assert_fails(capsys, 1, "cannot build key_dim 16 256 8", train_lm.main, *options)


def test_an_existing_run_is_not_overwritten(copy, capsys):
    assert_fails(capsys, 1, "already --resume --overwrite", train_lm.main, "--out", copy)


def test_a_missing_checkpoint_is_named(trained, capsys, tmp_path):
    missing = tmp_path / "nothing"
    assert_fails(capsys, 1, "no checkpoint nothing", train_lm.main, "--resume", "--out", missing)
    assert_fails(capsys, 1, "no checkpoint nothing", generate.main, "--checkpoint", missing)
    options = ("--checkpoint", trained, "--step", 3)
    assert_fails(capsys, 1, "no checkpoint step 3 [2, 4]", generate.main, *options)
    options = ("--checkpoint", trained, "--prompt", "")
    assert_fails(capsys, 2, "--prompt empty", generate.main, *options)


def test_a_checkpoint_of_another_model_is_refused(copy, capsys):
    options = [*TINY, "--resume", "--out", copy, "--width", 64, "--seed", 7]
    assert_fails(capsys, 1, "--width (32, now 64) --seed (0, now 7)", train_lm.main, *options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--length 8", "--length (16, now 8)"),
        ("--dtype bfloat16 --mixer gsa", "--dtype (float32, now bfloat16) --mixer (kda, now gsa)"),
        ("--text {text}", "the text ("),
        ("--steps 3", "--steps 3 is less than the 4 steps"),
        ("--resume 3", "no checkpoint of step 3 there are [2, 4]"),
    ],
)
def test_other_settings_are_refused_by_name(options, words, copy, capsys, tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"other" * 1000)
    options = options.format(text=text).split()
    call = [train_lm.main, *TINY, "--resume", "--out", copy, *options]
    assert_fails(capsys, 1, words, *call)


DAMAGES = {
    "one byte": (r"ocdbt.process_0/d/", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "cut off": (r"state/manifest.ocdbt", lambda data: data[:-10]),
    "settings": (r"settings/metadata", lambda data: data.replace(b"32", b"64")),
    "gone": (r"state/_METADATA", None),
    "unfinished": (checkpoint.CHECKSUMS, None),
    "checksums": (checkpoint.CHECKSUMS, lambda data: data[:-1]),
}


def damage(step, name):
    """Changes or removes a file of a checkpoint; returns its path inside it."""
    pattern, change = DAMAGES[name]
    files = [path for path in sorted(step.rglob("*")) if re.search(pattern, str(path))]
    path = max(files, key=lambda path: path.stat().st_size)
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    return path.relative_to(step)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named(name, copy, capfd):
    path = damage(copy / "checkpoints" / "4", name)
    words = f"cannot read checkpoints/4 damaged {path} step 2 is whole:"
    resume = [train_lm.main, *TINY, "--resume", "--out", copy]
    assert_fails(capfd, 1, f"{words} --resume 2", *resume)
    assert_fails(capfd, 1, f"{words} --step 2", generate.main, "--checkpoint", copy)
    damage(copy / "checkpoints" / "2", name)
    assert_fails(capfd, 1, f"cannot read {path} no older", *resume)


def test_an_older_checkpoint_is_resumed(trained, copy, no_report):
    """In place of the one that is damaged, which the run then writes again."""
    damage(copy / "checkpoints" / "4", "one byte")
    train("--out", copy, "--resume", 2)
    assert checkpoint.find_step(copy, flag="--resume") == 4
    assert_same_run(copy, trained)


def test_a_checkpoint_of_another_version_is_named(copy, capfd):
    """Its files are whole, and hold something else."""
    step = copy / "checkpoints" / "4"
    (step / "settings" / "metadata").write_text('{"model": {}}')
    (step / checkpoint.CHECKSUMS).write_text(json.dumps(checkpoint._checksums(step)))
    words = "cannot read checkpoints/4 version KeyError"
    assert_fails(capfd, 1, words, train_lm.main, *TINY, "--resume", "--out", copy)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in ("80", "100", "9"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / checkpoint.CHECKSUMS).write_text("{}")
    assert checkpoint.find_step(tmp_path, flag="--step") == 100
    assert checkpoint.find_step(tmp_path, 9, flag="--step") == 9
    checkpoint.delete_after(tmp_path, 9)
    assert os.listdir(tmp_path / "checkpoints") == ["9"]
