"""Draws docs/pictures from the files in benchmarks/results: `python -m benchmarks.plot`."""

import argparse
import hashlib
import itertools
import json
import math
import pathlib
import sys

from benchmarks import quality_plots
from benchmarks.tables import RESULTS, ROOT, newest

# How a mixer looks is the examples', whose recall program draws too. These are programs that import
# one another by bare names.
sys.path.insert(0, str(ROOT / "examples"))

import needs  # noqa: F401
from plot import LOOKS, THEMES, draw_recall, label_ends, leader, make_figure, themed

PICTURES = ROOT / "docs" / "pictures"
WIDTH = 7.2  # inches: a page's text at GitHub is as wide
CUDNN = "cudnn attention"
# How the names of jla's implementations begin ("triton as sm_80" is one, too). Of these the
# pictures show "pallas"; every other row of benchmarks/results is a peer's.
OURS = ("pallas", "xla", "reference", "triton")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    add = parser.add_argument
    add("--results", type=pathlib.Path, default=RESULTS, help="folder of the JSON files")
    add("--out", type=pathlib.Path, default=PICTURES, help="folder of the pictures")
    add("--png", action="store_true", help="PNG files, to look at, instead of SVG")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (read, _) in DRAWN.items():
        if not (numbers := read(options.results)):
            print(f"{name}: not drawn, for {options.results} has no rows for it")
            continue
        for theme in THEMES:
            path = options.out / f"{name}_{theme}.{'png' if options.png else 'svg'}"
            save(name, numbers, theme, path)
            print(path)


def save(name, numbers, theme, path):
    """Draws one picture into a file; an SVG file says in `digest` what it was drawn from."""
    with themed(theme) as colors:
        figure = DRAWN[name][1](numbers, colors)
        if path.suffix == ".svg":
            metadata = dict(Date=None, Title=name, Description=digest(numbers))
            figure.savefig(path, metadata=metadata)
        else:
            figure.savefig(path, dpi=192)


def digest(numbers):
    """A short text that differs when one of the numbers does."""
    text = json.dumps(numbers, sort_keys=True)
    return f"drawn from numbers {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def label(mixer, who):
    """A mixer and whose it is; MesaNet's solves end early in jla, but where `who` is "forced"."""
    whose = {"pallas": "jla", "forced": "jla", CUDNN: "cuDNN"}.get(who, who)
    steps = ", 30 steps" if mixer == "mesa" and who != "pallas" else ""
    return f"{LOOKS[mixer].name}, {whose}{steps}"


# Operations: time against the length, and beside other packages at one length.


def read_speed(folder):
    """{implementation: {mixer: [(T, nanoseconds a token)]}} of forward + backward."""
    lines, tokens, about = {}, set(), None
    for (mixer, shape, measure, who), (row, meta, _) in newest(folder).items():
        name = "attention" if who == CUDNN else mixer
        # All but these are of other numbers of heads, packed, or not in a picture.
        usual = shape in ("main", f"sweep {row['T']}", f"long {row['T']}") and name in LOOKS
        if measure != "backward" or not usual or who.startswith(OURS[1:]) or "ms" not in row:
            continue
        line = lines.setdefault(who, {}).setdefault(name, {})
        line[row["T"]] = 1e6 * row["ms"] / (row["B"] * row["T"])
        if who == "pallas":
            tokens.add(row["B"] * row["T"])
            about = f"On an {meta['card']}, {row['dtype']}, {row['H']} heads of {row['D']}"
    if about is None:
        return None
    about += f"; {' or '.join(f'{n:,}' for n in sorted(tokens))} tokens in a batch."
    lines = {
        who: {name: sorted(line.items()) for name, line in found.items()}
        for who, found in sorted(lines.items())
    }
    return dict(about=about, lines=lines)


def draw_speed(numbers, theme):
    figure, axes = make_figure(WIDTH, 5, numbers["about"])
    ends, points, lengths = [], [], set()
    for who, lines in numbers["lines"].items():
        for name, line in lines.items():
            look = LOOKS[name]
            tone = look.color if who in ("pallas", CUDNN) else lighter(look.color, theme)
            style = dict(color=tone, marker=look.marker, mec=theme.page, lw=2, ms=8, zorder=3)
            if who != "pallas":  # behind ours and larger, so that neither hides the other
                style |= dict(ls="--", mec=tone, mfc=theme.page, mew=2, ms=11, zorder=2)
            axes.plot(*zip(*line, strict=True), **style)
            lengths |= {T for T, _ in line}
            if who == "pallas":
                ends.append((*line[-1], look.name, look.color))
            elif who == CUDNN and len(line) > 1:
                ends.append((*line[-1], label(name, who), look.color))
            elif who == CUDNN:  # it would stand on KDA's line
                below = dict(ha="right", va="top", arrowprops=leader(look.color))
                at = dict(xytext=(-12, -26), textcoords="offset points", color=look.color)
                axes.annotate(label(name, who), line[0], **at, **below)
            elif len(line) > 1:
                middle = [math.sqrt(a * b) for a, b in zip(line[0], line[-1], strict=True)]
                at = dict(xytext=(0, -11), textcoords="offset points", color=look.color)
                axes.annotate(label(name, who), middle, ha="center", va="top", fontsize=11, **at)
            else:
                points.append((*line[0], label(name, who), look.color))
    axes.set(xscale="log", yscale="log", xlabel="tokens in a sequence (k = 1,024)")
    lengths = sorted(lengths)
    axes.set_xticks(lengths, [f"{T / 1024:.3g}k" if T >= 1024 else str(T) for T in lengths])
    low, high = axes.get_ylim()
    levels = [a * 10**b for b in range(5) for a in (1, 2, 5) if low < a * 10**b < high]
    axes.set_yticks(levels, [f"{level:,}" for level in levels])
    axes.set_xticks([], minor=True)
    axes.set_yticks([], minor=True)
    axes.grid()
    axes.set_title("Forward + backward, nanoseconds a token")
    label_ends(axes, ends)
    if points:
        to_axes = axes.transData + axes.transAxes.inverted()
        place = min(to_axes.transform(point[:2])[0] for point in points) - 0.05
        label_ends(axes, points, "left", place, weight="normal", fontsize=11)
    return figure


def lighter(color, theme):
    """The colour of a peer: nearer to the page's."""
    from matplotlib.colors import to_hex, to_rgb

    mixed = zip(to_rgb(color), to_rgb(theme.page), strict=True)
    return to_hex([0.6 * a + 0.4 * b for a, b in mixed])


def read_peers(folder):
    """Rows [mixer, implementation, forward ms, forward + backward ms] at the main shape."""
    found = newest(folder)
    ours = [v for k, v in found.items() if k[1:] == ("main", "forward", "pallas")]
    if not ours:
        return None
    peers = sorted({who for *_, who in found if not who.startswith(OURS)} - {CUDNN})

    def ms(mixer, measure, who):
        row, _, _ = found.get((mixer, "main", measure, who), ({}, None, None))
        return row.get("ms")

    rows = []
    for name in LOOKS:
        if name == "attention":  # timed beside every mechanism, at the same shape
            rows.append([name, CUDNN, ms("kda", "forward", CUDNN), ms("kda", "backward", CUDNN)])
            continue
        for who in ("pallas", *peers):
            rows.append([name, who, ms(name, "forward", who), ms(name, "backward", who)])
        forced = [ms(name, f"forced_{what}", "pallas") for what in ("forward", "backward")]
        rows.insert(-len(peers) or len(rows), [name, "forced", *forced])
    row, meta, _ = ours[0]
    about = f"Milliseconds on an {meta['card']}, {row['dtype']}, {row['B']} sequences of "
    about += f"{row['T']:,} tokens, {row['H']} heads of {row['D']}."
    return dict(about=about, rows=[row for row in rows if any(row[2:])])


def draw_peers(numbers, theme):
    rows = numbers["rows"]
    figure, panels = make_figure(WIDTH, 1 + 0.3 * len(rows), numbers["about"], 2)
    places = in_groups([name for name, *_ in rows])
    colors = [
        LOOKS[name].color
        if who in ("pallas", "forced", CUDNN)
        else lighter(LOOKS[name].color, theme)
        for name, who, *_ in rows
    ]
    for i, title in enumerate(("Forward", "Forward + backward")):
        bars(panels[i], places, [row[2 + i] for row in rows], colors, room=0.32)
        panels[i].set_title(title)
    panels[0].set_yticks(places, [label(name, who) for name, who, *_ in rows])
    for text, (_, who, *_) in zip(panels[0].get_yticklabels(), rows, strict=True):
        text.set_color(theme.ink if who in ("pallas", "forced") else theme.quiet)
    panels[0].invert_yaxis()
    return figure


# Whole models.


def read_recall(folder):
    path = folder / "recall_full.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    keys = ("mixer", "pairs", "accuracy", "queries")
    rows = [{key: row[key] for key in keys} for row in report["results"]]
    settings, queries = report["settings"], [row["queries"] for row in rows]
    about = f"{settings['length']} tokens, width {settings['width']}, {settings['depth']} blocks, "
    about += f"{settings['steps']:,} steps, {settings['dtype']}; "
    about += f"at least {min(queries):,} queries a point."
    return dict(about=about, rows=rows)


def draw_recall_full(numbers, theme):
    figure, axes = make_figure(WIDTH, 5, numbers["about"])
    draw_recall(axes, numbers["rows"], theme)
    return figure


def read_decode(folder):
    """Panels {title: {mixer: number}}."""
    rows = rows_of(folder / "generation.json")
    sampled = [row for row in rows if "step_ms" in row]
    panels = {}
    for row in sampled:
        panel = panels.setdefault(f"Batch of {row['batch']},\ntokens/s", {})
        panel[row["mixer"]] = row["tokens_per_s"]
    if not panels:
        return None
    prompts = [row for row in rows if "prefill_ms" in row]
    panels["State of a\nsequence, MiB"] = {
        row["mixer"]: row["state_bytes"] / 2**20 for row in prompts
    }
    about = f"{models(prompts)}; prompt of {prompts[0]['prompt']:,} tokens."
    return dict(about=about, panels=panels)


def draw_decode(numbers, theme):
    panels = numbers["panels"]
    figure, all_axes = make_figure(WIDTH, 3.6, numbers["about"], len(panels))
    names = [name for name in LOOKS if any(name in panel for panel in panels.values())]
    colors = [LOOKS[name].color for name in names]
    for axes, (title, panel) in zip(all_axes, panels.items(), strict=True):
        bars(axes, range(len(names)), [panel.get(name) for name in names], colors, room=0.4)
        axes.set_title(title)
    all_axes[0].set_yticks(range(len(names)), [LOOKS[name].name for name in names])
    all_axes[0].invert_yaxis()
    return figure


def read_language_model(folder):
    """Bars [mixer, number of GPUs, tokens a second], a mixer's beside one another."""
    rows = [row for row in rows_of(folder / "language_model.json") if "tokens_per_s" in row]
    if not rows:
        return None
    found = {(row["mixer"], row["gpus"]): row["tokens_per_s"] for row in rows}
    drawn = [
        [name, gpus, found[name, gpus]]
        for name in LOOKS
        for gpus in sorted({row["gpus"] for row in rows})
        if (name, gpus) in found
    ]
    about = f"{models(rows)}; {rows[0]['batch_per_gpu']} x {rows[0]['length']:,} bytes a GPU."
    return dict(about=about, bars=drawn)


def draw_language_model(numbers, theme):
    drawn = numbers["bars"]
    figure, axes = make_figure(WIDTH, 5, numbers["about"])
    places = in_groups([name for name, *_ in drawn])
    colors = [LOOKS[name].color for name, *_ in drawn]
    bars(axes, places, [speed / 1e3 for *_, speed in drawn], colors, room=0.12)
    for place, (_, gpus, _) in zip(places, drawn, strict=True):
        text = f"{gpus} GPU{'s' if gpus > 1 else ''}"
        beside(axes, 0, place, text, color="white", fontsize=11, weight="bold")
    names = {name: [] for name, *_ in drawn}
    for place, (name, *_) in zip(places, drawn, strict=True):
        names[name].append(place)
    axes.set_yticks(
        [sum(at) / len(at) for at in names.values()], [LOOKS[name].name for name in names]
    )
    axes.invert_yaxis()
    axes.set_title("Training, thousand tokens a second")
    return figure


def rows_of(path):
    return json.loads(path.read_text())["results"] if path.exists() else []


def models(rows):
    """In words: the size of the models, and what they ran on."""
    millions = [row["parameters"] / 1e6 for row in rows]
    size = f"{min(millions):.0f} to {max(millions):.0f} million parameters"
    return f"Models of {size}, bfloat16, {rows[0]['meta']['card']}"


def in_groups(names):
    """Places for bars; those of one name stand nearer to one another."""
    places = [0]
    for name, after in itertools.pairwise(names):
        places.append(places[-1] + (1 if name == after else 1.5))
    return places


def bars(axes, places, values, colors, room):
    """Bars from zero, each with its number at its end; nothing where a value is None.

    `room` is what the numbers need of the axes, as a share of the longest bar.
    """
    longest = max(filter(None, values), default=1)
    axes.barh(places, [value or 0 for value in values], color=colors, height=0.86)
    for place, value in zip(places, values, strict=True):
        if value is not None:
            digits = 2 if longest < 100 else 1 if value < 10 else 0
            beside(axes, value, place, f"{value:,.{digits}f}", fontsize=12)
    axes.set_xlim(0, (1 + room) * longest)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)


def beside(axes, x, y, text, **style):
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center_baseline", **style)


DRAWN = {
    "speed": (read_speed, draw_speed),
    "peers": (read_peers, draw_peers),
    "recall": (read_recall, draw_recall_full),
    "decode": (read_decode, draw_decode),
    "language_model": (read_language_model, draw_language_model),
    **quality_plots.DRAWN,
}

if __name__ == "__main__":
    main()
