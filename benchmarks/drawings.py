"""Draws the pictures of docs/mechanisms.md into docs/pictures: `python -m benchmarks.drawings`."""

import pathlib

from benchmarks.plot import LOOKS, PICTURES, THEMES, digest, themed


class Canvas:
    """A picture without axes, in units of which `width` fit, with boxes, arrows and words."""

    def __init__(self, theme, width, height, mixer):
        from matplotlib.figure import Figure

        self.theme, self.color = theme, LOOKS[mixer].color
        self.figure = Figure((0.72 * width, 0.72 * height), facecolor="none")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x, y, width, height, text="", strength=0.0, edge=None, size=11):
        from matplotlib.patches import Rectangle

        edge = edge or self.theme.quiet
        if strength:
            fill = dict(facecolor=self.color, alpha=strength, linewidth=0)
            self.axes.add_patch(Rectangle((x, y), width, height, **fill))
        line = dict(facecolor="none", edgecolor=edge, linewidth=1.1)
        self.axes.add_patch(Rectangle((x, y), width, height, **line))
        self.text(x + width / 2, y + height / 2, text, size=size)

    def text(self, x, y, text, size=11, quiet=False, ha="center", **style):
        color = self.theme.quiet if quiet else self.theme.ink
        self.axes.text(x, y, text, ha=ha, va="center", size=size, **{"color": color} | style)

    def arrow(self, start, end, color=None, curve=0.0, dashed=False, width=1.4):
        style = dict(arrowstyle="-|>", color=color or self.theme.quiet, lw=width, shrinkA=2)
        style |= dict(shrinkB=2, linestyle="--" if dashed else "-", mutation_scale=11)
        style |= dict(connectionstyle=f"arc3,rad={curve}")
        self.axes.annotate("", end, start, arrowprops=style)


def kda(theme):
    """Chunks: a triangle inside of each, and a state that goes from one to the next."""
    canvas = Canvas(theme, 7.2, 2.9, "kda")
    for i in range(3):
        left = 0.15 + 2.35 * i
        triangle(canvas, left + 0.2, 0.85, 6, 0.2)
        canvas.text(left + 0.8, 0.55, f"chunk {i + 1}", quiet=True, size=10)
        canvas.box(left + 1.62, 1.15, 0.5, 0.6, "S", strength=0.25)
        canvas.arrow((left + 1.42, 1.45), (left + 1.62, 1.45))
        if i < 2:
            canvas.arrow((left + 2.12, 1.45), (left + 2.53, 1.45), color=canvas.color)
    canvas.text(0.35, 2.6, "inside a chunk: one triangular system, all chunks at once", ha="left")
    canvas.text(0.35, 2.32, "(I + A) E = V \u2212 (P K) S", ha="left", size=10, quiet=True)
    canvas.text(6.9, 0.2, "between chunks: S, one after another", ha="right", color=canvas.color)
    return canvas.figure


def triangle(canvas, x, y, count, size, strength=0.45):
    """A lower triangle of a chunk's pairs of tokens: rows read, columns were written."""
    for row in range(count):
        for column in range(count):
            kind = strength if column <= row else 0.0
            place = x + column * size, y + (count - 1 - row) * size
            canvas.box(*place, size, size, strength=kind)


def gsa(theme):
    """Two passes with a softmax over the slots between them."""
    canvas = Canvas(theme, 7.2, 2.5, "gsa")
    canvas.box(0.3, 1.0, 0.9, 0.6, "q")
    canvas.box(1.75, 0.75, 1.2, 1.1, "", strength=0.25)
    slots(canvas, 1.75, 0.75, 1.2, 1.1)
    canvas.text(2.35, 2.1, "slots' keys Hk", size=10)
    canvas.box(3.5, 1.0, 1.0, 0.6, "softmax")
    canvas.text(4.0, 0.72, "over M slots", size=9, quiet=True)
    canvas.box(5.05, 0.75, 1.2, 1.1, "", strength=0.25)
    slots(canvas, 5.05, 0.75, 1.2, 1.1)
    canvas.text(5.65, 2.1, "slots' values Hv", size=10)
    canvas.text(6.85, 1.3, "o", size=12)
    for a, b in ((1.2, 1.75), (2.95, 3.5), (4.5, 5.05), (6.25, 6.7)):
        canvas.arrow((a, 1.3), (b, 1.3), color=canvas.color)
    canvas.text(2.35, 0.42, "written by k and s,", size=9, quiet=True)
    canvas.text(2.35, 0.2, "first linear attention", size=9, quiet=True)
    canvas.text(5.65, 0.42, "written by s and v,", size=9, quiet=True)
    canvas.text(5.65, 0.2, "second linear attention", size=9, quiet=True)
    return canvas.figure


def slots(canvas, x, y, width, height):
    for i in range(1, 5):
        place = x + i * width / 5
        canvas.axes.plot([place] * 2, [y, y + height], color=canvas.theme.quiet, lw=0.8)


def mesa(theme):
    """Two sums of the past, and a solve for each token."""
    canvas = Canvas(theme, 7.2, 2.5, "mesa")
    canvas.box(0.2, 1.35, 1.75, 0.8, "Hkk = \u03a3 \u03b2 k k\u1d40", strength=0.25, size=10)
    canvas.box(0.2, 0.35, 1.75, 0.8, "Hkv = \u03a3 \u03b2 k v\u1d40", strength=0.25, size=10)
    canvas.box(2.75, 1.25, 2.35, 1.0, "")
    canvas.text(3.92, 1.92, "(Hkk + \u039b) x = q", size=11)
    canvas.text(3.92, 1.55, "conjugate gradients", size=9, quiet=True)
    canvas.box(5.75, 0.45, 1.25, 0.6, "o = Hkv\u1d40 x", size=9)
    canvas.arrow((1.95, 1.75), (2.75, 1.75), color=canvas.color)
    canvas.arrow((1.95, 0.75), (5.75, 0.75), color=canvas.color)
    canvas.arrow((5.1, 1.75), (6.3, 1.05), curve=-0.35)
    canvas.arrow((4.62, 1.25), (3.22, 1.25), curve=-0.75, color=canvas.color)
    canvas.text(3.92, 0.28, "repeat until the residual is small", size=9, quiet=True)
    return canvas.figure


def log_linear(theme):
    """The buckets of one token, and the tree of chunks."""
    canvas = Canvas(theme, 7.2, 2.9, "log_linear")
    unit, base, count, t = 0.4, 0.75, 16, 13
    for i in range(count):
        strength = 0.0 if i > t else 0.12
        canvas.box(0.4 + i * unit, base, unit, 0.35, str(i), strength=strength, size=9)
    first = 0
    for level in (4, 3, 1, 0):  # 13 is 1101 in binary: levels 4, 3, 1, and itself
        size = 2 ** (level - 1) if level else 1
        left = 0.4 + first * unit
        canvas.box(
            left + 0.03, 1.45, size * unit - 0.06, 0.45, f"S{level}", 0.2 + 0.12 * level, size=10
        )
        canvas.arrow((left + size * unit / 2, 1.1), (left + size * unit / 2, 1.45))
        first += size
    canvas.text(0.4, 2.55, "token 13 = 1101 in binary reads four buckets", ha="left")
    canvas.text(
        0.4,
        2.25,
        "level l has 2^(l \u2212 1) tokens; each level has its own scale",
        10,
        True,
        "left",
    )
    canvas.text(0.4, 0.4, "8 tokens far away in one sum, 1 token close by alone", 10, True, "left")
    return canvas.figure


def path(theme):
    """A key is turned by each token between it and the query."""
    canvas = Canvas(theme, 7.2, 2.5, "path")
    names = ["k\u209b", "P", "P", "P", "q\u209c"]
    for i, name in enumerate(names):
        edge = canvas.color if name == "P" else None
        strength = 0.25 if name == "P" else 0.0
        canvas.box(0.5 + 1.35 * i, 1.05, 0.75, 0.6, name, strength, edge, size=13)
        if i:
            canvas.arrow((0.5 + 1.35 * i - 0.6, 1.35), (0.5 + 1.35 * i, 1.35), color=canvas.color)
    canvas.text(0.5, 2.2, "each token between key and query reflects the key a little:", ha="left")
    canvas.text(3.58, 0.75, "s+1   ...   t", size=10, quiet=True)
    canvas.text(
        3.6,
        0.3,
        "P = I \u2212 \u03b2 w w\u1d40,  products of 64 of them are two thin matrices",
        10,
        True,
    )
    return canvas.figure


DRAWN = {f.__name__: f for f in (kda, gsa, mesa, log_linear, path)}


def main(out=PICTURES):
    for name, draw in DRAWN.items():
        for theme in THEMES:
            with themed(theme) as colors:
                about = dict(Date=None, Title=draw.__doc__, Description=source())
                place = out / f"mechanism_{name}_{theme}.svg"
                draw(colors).savefig(place, metadata=about, facecolor="none")


def source():
    """A text that differs when this file does."""
    return digest(pathlib.Path(__file__).read_text())


if __name__ == "__main__":
    main()
