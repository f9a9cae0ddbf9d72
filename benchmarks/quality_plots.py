"""What the pictures of quality.py and recall_sizes.py show; benchmarks.plot draws them."""

import statistics
import sys

from benchmarks.quality_tables import best_rate, best_seeds, by_model, read
from benchmarks.tables import ROOT

# How a mixer looks is the examples'.
sys.path.insert(0, str(ROOT / "examples"))

from plot import LOOKS, Look, label_ends, make_figure  # isort: skip

WIDTH = 7.2  # inches, as in benchmarks.plot


def looks(theme):
    """LOOKS, and that of the hybrid."""
    return LOOKS | {"hybrid": Look("3 KDA : 1 PaTH", theme.ink, "P")}


def read_quality(folder):
    """`models`: lines {model: [[tokens, seconds, bits a byte]]} of held-out text, with the best
    of its learning rates."""
    rows = [row for row in read(folder, "quality.json") if "held_out_by_length" in row]
    lines = {}
    for model, found in by_model(rows).items():
        if ":" in model:  # changed settings are in a table
            continue
        best = best_rate(found)
        row = min((row for row in found if row["lr"] == best), key=lambda row: row["seed"])
        lines[model] = [
            [
                point["step"] * row["batch"] * row["length"],
                point["step"] * row["step_ms"] / 1e3,
                point["held_out_bits_per_byte"],
            ]
            for point in row["curve"]
        ]
    if not lines:
        return None
    one = rows[0]
    about = f"Models of {one['parameters_wanted'] / 1e6:.0f} million parameters, {one['dtype']}, "
    about += f"on an {one['meta']['card']}; windows of {one['length']:,} tokens, "
    about += f"{one['batch']} in a step; a part of the held-out text."
    return dict(about=about, models=lines)


def draw_quality(numbers, theme):
    figure, panels = make_figure(WIDTH, 5, numbers["about"], 2)
    ends = []
    for model, line in numbers["models"].items():
        look = looks(theme)[model]
        style = dict(color=look.color, marker=look.marker, mec=theme.page, lw=1.6, ms=6)
        style |= dict(ls="--" if model == "attention" else "-")
        tokens, seconds, bits = zip(*line, strict=True)
        panels[0].plot([x / 1e6 for x in tokens], bits, **style)
        panels[1].plot(seconds, bits, **style)
        ends.append((seconds[-1], bits[-1], look.name, look.color))
    # The first points are far above; what differs is at the end.
    last = [line[-1][2] for line in numbers["models"].values()]
    early = [line[min(1, len(line) - 1)][2] for line in numbers["models"].values()]
    panels[0].set_ylim(min(last) - 0.02, max(early) + 0.02)
    panels[0].set(xlabel="million tokens")
    panels[1].set(xlabel="seconds of training")
    panels[0].set_title("Held-out text, bits a byte")
    for axes in panels:
        axes.grid()
    label_ends(panels[1], ends)
    return figure


def read_recall_sizes(folder):
    """`models`: points [key_dim, KiB, [[pairs, mean, least, most accuracy]]] of each model."""
    rows = [row for row in read(folder, "recall_sizes.json") if "curve" in row]
    models = {}
    for model, found in by_model(rows).items():
        for key_dim in sorted({row["key_dim"] for row in found}) if ":" not in model else ():
            chosen = best_seeds([row for row in found if row["key_dim"] == key_dim])
            shares = zip(*(row["accuracy"] for row in chosen), strict=True)
            points = [
                [pairs, statistics.mean(of), min(of), max(of)]
                for pairs, of in zip(chosen[0]["pairs"], shares, strict=True)
            ]
            models.setdefault(model, []).append([key_dim, chosen[0]["state_bytes"] / 2**10, points])
    if not models:
        return None
    one = rows[0]
    about = f"{one['length']:,} tokens, width {one['width']}, {one['depth']} blocks of "
    about += f"{one['heads']} heads, {one['steps']:,} steps, {one['dtype']}; mean, least and most "
    about += f"of {len({row['seed'] for row in rows})} seeds."
    return dict(about=about, models=models)


def draw_recall_sizes(numbers, theme):
    """Left accuracy against pairs, with heads of the middle size; right, of one number of pairs,
    against the state's size."""
    figure, panels = make_figure(WIDTH, 5, numbers["about"], 2)
    sizes = sorted({key_dim for of in numbers["models"].values() for key_dim, *_ in of})
    middle = sizes[len(sizes) // 2]
    counts = [pairs for pairs, *_ in next(iter(numbers["models"].values()))[0][2]]
    asked = counts[max(0, len(counts) - 2)]
    ends = []

    def line(axes, points, look, dashed):
        x, y, low, high = zip(*points, strict=True)
        bars = [[a - b for a, b in zip(y, low, strict=True)]]
        bars.append([b - a for a, b in zip(y, high, strict=True)])
        style = dict(color=look.color, marker=look.marker, mec=theme.page, lw=1.6, ms=8)
        axes.errorbar(x, y, bars, capsize=3, ls="--" if dashed else "-", **style)

    for model, of in numbers["models"].items():
        look, dashed = looks(theme)[model], model == "attention"
        by_pairs = [points for key_dim, _, points in of if key_dim == middle]
        if by_pairs:
            line(panels[0], by_pairs[0], look, dashed)
        by_size = [
            [kib, *rest] for _, kib, points in of for pairs, *rest in points if pairs == asked
        ]
        line(panels[1], by_size, look, dashed)
        ends.append((by_size[-1][0], by_size[-1][1], look.name, look.color))
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.grid()
    panels[0].set_xticks(counts, [str(count) for count in counts])
    panels[0].set_xticks([], minor=True)
    panels[0].set(xlabel="pairs in a sequence", ylim=(-0.03, 1.05))
    panels[0].set_title(f"Recall with heads of {middle}")
    panels[1].xaxis.set_major_formatter("{x:,.0f}")
    panels[1].set(xlabel="state, KiB")
    panels[1].set_title(f"Of {asked} pairs")
    label_ends(panels[1], ends)
    return figure


DRAWN = {
    "quality": (read_quality, draw_quality),
    "recall_sizes": (read_recall_sizes, draw_recall_sizes),
}
