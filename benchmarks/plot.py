"""Plots results: `python -m benchmarks.plot FILE.json [FILE.json ...] OUT.png`."""

import json
import sys


def plot(results, meta, path):
    """Draws time against T at main's number of tokens; False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    main = [r for r in results if r["shape"] == "main"]
    tokens = main[0]["B"] * main[0]["T"] if main else None
    curves = {}
    for r in results:
        in_sweep = r["B"] * r["T"] == tokens or r["group"] == "sweep"
        if in_sweep and not r["packed"] and "ms" in r and r["measure"] in ("forward", "backward"):
            line = curves.setdefault(r["measure"], {}).setdefault(
                f"{r['mechanism']} {r['implementation']}", {}
            )
            line[r["T"]] = r["ms"]
    if not curves:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    titles = dict(forward="forward", backward="forward + backward")
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for label, line in curves.get(measure, {}).items():
            axis.plot(*zip(*sorted(line.items()), strict=True), marker="o", label=label)
        ticks = sorted({T for line in curves.get(measure, {}).values() for T in line})
        axis.set(xscale="log", yscale="log", title=title, xlabel="T (tokens in a sequence)")
        axis.set_xticks(ticks, [str(T) for T in ticks], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    if curves.get("backward"):
        axes[1].legend()
    else:
        axes[0].legend()
    figure.suptitle(f"{meta['card']}, B x T = {tokens or 'as in the table'}, {meta['date'][:10]}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def main(arguments):
    *sources, path = arguments
    results = []
    for source in sources:
        with open(source) as file:
            data = json.load(file)
        results += data["results"]
    if not plot(results, data["meta"], path):
        raise SystemExit("there is no forward or backward time in these files")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
