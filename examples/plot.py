"""The programs' pictures, and how a mixer looks in every picture of this repository.

matplotlib is imported when something is drawn: it comes with the extra `examples`.
"""

import contextlib
import math
import textwrap
from typing import NamedTuple


class Look(NamedTuple):
    name: str
    color: str
    marker: str


# In this order everywhere. Any two colours are at least 18 apart in CIELAB, also as people see them
# who lack one kind of cone; the contrast to a white page and to a dark one is at least 3.
LOOKS = {
    "kda": Look("KDA", "#2470dd", "o"),
    "gsa": Look("GSA", "#946a35", "s"),
    "log_linear": Look("log-linear", "#14a56c", "D"),
    "mesa": Look("MesaNet", "#d860b8", "^"),
    "path": Look("PaTH", "#ee5518", "v"),
    "attention": Look("softmax", "#787b80", "X"),
}


class Theme(NamedTuple):
    page: str
    ink: str
    quiet: str
    grid: str


THEMES = {
    "light": Theme(page="#ffffff", ink="#1f2328", quiet="#59636e", grid="#d1d9e0"),
    "dark": Theme(page="#0d1117", ink="#f0f6fc", quiet="#9da7b3", grid="#343b44"),
}


@contextlib.contextmanager
def themed(name="light"):
    """Figures that are made and saved inside have this theme, and SVG files no random names."""
    import matplotlib

    theme = THEMES[name]
    colors = ["figure.facecolor", "axes.facecolor", "savefig.facecolor"]
    settings = dict.fromkeys(colors, theme.page)
    settings |= dict.fromkeys(["text.color", "axes.labelcolor", "ytick.labelcolor"], theme.ink)
    settings |= {"xtick.labelcolor": theme.ink, "axes.edgecolor": theme.quiet}
    settings |= {"xtick.color": theme.quiet, "ytick.color": theme.quiet, "grid.color": theme.grid}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    settings |= {"font.family": "DejaVu Sans", "font.size": 13, "axes.titlesize": 13}
    settings |= {"axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 12}
    settings |= {"xtick.labelsize": 12, "ytick.labelsize": 12}
    settings |= {"svg.hashsalt": "jla", "svg.fonttype": "path", "path.simplify": False}
    with matplotlib.rc_context(settings):
        yield theme


def make_figure(width, height, about="", columns=1):
    """A figure of this size in inches, and its axes; `about` stands small below them.

    No window and no display are needed.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    style = dict(x=0.01, ha="left", fontsize=10, color=rcParams["xtick.color"])
    figure.supxlabel(textwrap.fill(about, 88), **style)
    return figure, figure.subplots(1, columns, sharey=True)


def label_ends(axes, ends, side="right", place=1.06, gap=0.075, **style):
    """Names curves beside their ends: `ends` are (x, y, text, color). The axes' limits are set.

    The names stand left or right of `place`, a share of the axes' width. Names that would touch are
    moved apart, by a share `gap` of the axes' height, and thin lines lead to them.
    """
    style = dict(weight="bold", ha="left" if side == "right" else "right", va="center") | style
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    heights = [to_axes.transform(end[:2])[1] for end in ends]
    for (x, y, text, color), height in zip(ends, apart(heights, gap), strict=True):
        axes.annotate(
            text,
            (x, y),
            (place, height),
            textcoords="axes fraction",
            color=color,
            arrowprops=leader(color),
            **style,
        )


def leader(color):
    """The line from a name to what it names."""
    return dict(arrowstyle="-", color=color, lw=0.8, shrinkA=1, shrinkB=5)


def apart(places, gap):
    """Moves sorted places as little as puts each at least `gap` above the one before."""
    pools = []  # the places less the gaps below them: their means, where the order would be wrong
    for i, place in enumerate(places):
        pools.append((place - gap * i, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    means = [mean for mean, count in pools for _ in range(count)]
    return [mean + gap * i for i, mean in enumerate(means)]


def draw_recall(axes, rows, theme):
    """Draws the share of wrong answers against the number of pairs, from the rows of recall.py.

    Both axes are logarithmic. Below the smallest share is a strip for "none", with a lane for each
    mixer; beside it, mixers stand a little apart, so that none hides another.
    """
    counts = sorted({row["pairs"] for row in rows})
    mixers = [mixer for mixer in LOOKS if any(row["mixer"] == mixer for row in rows)]
    # The accuracies are rounded to float32.
    shares = {
        (row["mixer"], row["pairs"]): round((1 - row["accuracy"]) * row["queries"]) / row["queries"]
        for row in rows
    }
    lowest = math.floor(math.log10(min(filter(None, shares.values()), default=0.1)))
    lane, step = 0.16, 0.07
    bottom = lowest - lane * (len(mixers) + 1)
    ends = []
    for i, mixer in enumerate(mixers):
        look, aside = LOOKS[mixer], 2 ** (step * (i - (len(mixers) - 1) / 2))
        points = []
        for count in counts:
            if (share := shares.get((mixer, count))) is not None:
                level = math.log10(share) if share else lowest - lane * (i + 1)
                points.append((count * aside, level))
        axes.plot(
            *zip(*points, strict=True),
            color=look.color,
            marker=look.marker,
            ls="--" if mixer == "attention" else "-",
            lw=1.6,
            ms=8,
            mec=theme.page,
            mew=0.7,
        )
        ends.append((*points[-1], look.name, look.color))
    axes.axhspan(bottom, lowest, color=theme.grid, alpha=0.5, lw=0, zorder=0)
    guess = [math.log10(1 - 1 / count) if count > 1 else bottom for count in counts]
    axes.plot(counts, guess, color=theme.quiet, ls=":", lw=1.2)
    ends.append((counts[-1], guess[-1], "guessing", theme.quiet))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xticks([], minor=True)
    levels = range(lowest, 1)
    names = [f"{100 * 10**level:.10g}%" for level in levels]
    axes.set_yticks([(bottom + lowest) / 2, *levels], ["none", *names])
    axes.set(xlabel="key-value pairs in a sequence", ylim=(bottom, 0.1))
    for level in levels:
        axes.axhline(level, color=theme.grid, lw=0.8, zorder=0)
    axes.set_title("Associative recall: share of wrong answers")
    label_ends(axes, ends)


def plot_recall(rows, about, path):
    """Draws the rows of recall.py, all mixers in one picture."""
    with themed() as theme:
        figure, axes = make_figure(7.2, 5, about)
        draw_recall(axes, rows, theme)
        figure.savefig(path, dpi=120)


def plot_losses(lines, baselines, path):
    """Draws the lines of metrics.jsonl, with the byte models' bits per byte as level lines."""
    training = [(line["step"], line["loss"] / math.log(2)) for line in lines if "loss" in line]
    held_out = [
        (line["step"], line["held_out_bits_per_byte"])
        for line in lines
        if "held_out_bits_per_byte" in line
    ]
    with themed() as theme:
        figure, axes = make_figure(7.2, 4.6)
        axes.plot(*zip(*training, strict=True), color="#2470dd", lw=0.8, label="training")
        axes.plot(*zip(*held_out, strict=True), "o-", color="#ee5518", label="held-out text")
        for (name, bits), style in zip(baselines.items(), (":", "--"), strict=True):
            axes.axhline(bits, color=theme.quiet, ls=style, lw=1, label=f"{name} ({bits:.2f})")
        axes.set(xlabel="step")
        axes.set_title("Bits per byte")
        axes.grid()
        axes.legend(fontsize=11)
        figure.savefig(path, dpi=120)
