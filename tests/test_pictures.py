"""docs/pictures is drawn from benchmarks/results; a mixer looks the same in every picture."""

import json
import pathlib
import subprocess
import sys

import made_up
import pytest

from benchmarks import drawings, plot
from benchmarks.tables import RESULTS

# Of the examples, whose folder benchmarks.plot has added to the path.
from model import MIXERS  # isort: skip
from plot import LOOKS, THEMES, apart, draw_recall, make_figure, themed  # isort: skip


def test_every_mixer_has_its_look():
    assert list(LOOKS) == list(MIXERS)
    for column in zip(*LOOKS.values(), strict=True):
        assert len(set(column)) == len(LOOKS)


@pytest.mark.parametrize("theme", THEMES)
def test_colors_stand_out_from_the_page(theme):
    def luminance(color):
        channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c < 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for look in LOOKS.values():
        dark, light = sorted(luminance(color) for color in (look.color, THEMES[theme].page))
        assert (light + 0.05) / (dark + 0.05) >= 3, look


@pytest.mark.parametrize("name", plot.DRAWN)
def test_pictures_are_up_to_date(name):
    """`python -m benchmarks.plot` was run after the last change of benchmarks/results."""
    read, _ = plot.DRAWN[name]
    numbers = read(RESULTS)
    for theme in THEMES:
        path = plot.PICTURES / f"{name}_{theme}.svg"
        if numbers is None:  # not measured yet
            assert not path.exists()
            continue
        picture = path.read_text()
        assert plot.digest(numbers) in picture
        assert len(picture) < 100_000
        for mixer in numbers.get("models", LOOKS):
            # Letters are drawn as paths; a comment says what they spell.
            assert mixer not in LOOKS or f"<!-- {LOOKS[mixer].name}" in picture


@pytest.mark.parametrize("name", plot.DRAWN)
def test_pictures_can_be_drawn(name, tmp_path):
    read, draw = plot.DRAWN[name]
    numbers = read(RESULTS)
    if numbers is None:
        made_up.write(tmp_path)
        numbers = read(tmp_path)
    with themed("dark") as theme:
        figure = draw(numbers, theme)
    for axes in figure.axes:
        low, _ = axes.get_xlim()
        assert low == 0 or not axes.patches or name == "recall"  # bars start at zero


@pytest.mark.parametrize("name", drawings.DRAWN)
def test_drawings_are_up_to_date(name):
    """`python -m benchmarks.drawings` was run after the last change of benchmarks/drawings.py."""
    for theme in THEMES:
        picture = (plot.PICTURES / f"mechanism_{name}_{theme}.svg").read_text()
        assert drawings.source() in picture and len(picture) < 100_000


def test_a_picture_is_the_same_each_time(tmp_path):
    paths = [tmp_path / "first.svg", tmp_path / "second.svg"]
    for path in paths:
        plot.save("decode", plot.read_decode(RESULTS), "light", path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second and b"<dc:date>" not in first


def test_a_folder_without_rows_gives_no_pictures(tmp_path, capsys):
    plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": not drawn")[0] for line in lines] == list(plot.DRAWN)
    assert not list((tmp_path / "out").iterdir())


def test_one_run_alone_is_drawn(tmp_path, capsys):
    row = dict(mechanism="gsa", shape="main", measure="forward", implementation="pallas", ms=0.9)
    row |= dict(B=8, T=4096, H=16, D=128, dtype="bfloat16")
    failed = row | dict(measure="backward", error="RuntimeError")
    report = dict(meta=dict(card="some GPU", date="2026"), results=[row, failed])
    (tmp_path / "run.json").write_text(json.dumps(report))
    plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "out"), "--png"])
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["peers_dark.png", "peers_light.png"]
    assert capsys.readouterr().out.count("not drawn") == len(plot.DRAWN) - 1


def test_no_mixer_hides_another():
    """All remember all, or nothing, or one of them has not been run with one number of pairs."""
    accuracies = {2: 1.0, 4: 0.0, 8: 0.75}
    rows = [
        dict(mixer=mixer, pairs=pairs, accuracy=accuracy, queries=64)
        for mixer in LOOKS
        for pairs, accuracy in accuracies.items()
        if (mixer, pairs) != ("gsa", 8)
    ]
    with themed() as theme:
        _, axes = make_figure(7, 5)
        draw_recall(axes, rows, theme)
    points = [tuple(point) for line in axes.lines[: len(LOOKS)] for point in line.get_xydata()]
    assert len(set(points)) == len(points) == 17


def test_names_are_moved_apart():
    assert apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert apart([0.1, 0.5, 0.52], 0.1) == pytest.approx([0.1, 0.46, 0.56])
    assert apart([], 0.1) == []


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import sys, benchmarks.plot; sys.exit('matplotlib' in sys.modules)"
    root = pathlib.Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
