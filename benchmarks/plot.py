"""Plots results of one or more runs: `python -m benchmarks.plot FILE.json ... OUT.png`."""

import json
import sys


def plot(results, meta, path):
    """Draws time against T, at main's number of tokens; False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = [r for r in results if r["group"] in ("main", "sweep", "long")]
    tokens = {r["B"] * r["T"] for r in results if r["group"] != "long"}
    titles = dict(forward="forward", backward="forward + backward")
    curves = {measure: {} for measure in titles}
    for r in results:
        if r["measure"] in titles and "ms" in r and r["B"] * r["T"] in tokens and not r["packed"]:
            line = f"{r['mechanism']} {r['implementation']}"
            curves[r["measure"]].setdefault(line, {})[r["T"]] = r["ms"]
    if not any(curves.values()):
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, (measure, lines) in zip(axes, curves.items(), strict=True):
        for label, line in lines.items():
            axis.plot(*zip(*sorted(line.items()), strict=True), marker="o", label=label)
        axis.set(xscale="log", yscale="log", title=titles[measure])
        axis.set(xlabel="T (tokens in a sequence)", ylabel="milliseconds")
        ticks = sorted({T for line in lines.values() for T in line})
        axis.set_xticks(ticks, [str(T) for T in ticks], rotation=45, fontsize=8)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3, which="both")
        if lines:
            axis.legend()
    total = " or ".join(map(str, sorted(tokens)))
    figure.suptitle(f"{meta['card']}, B x T = {total}, {meta['date'][:10]}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    files = [json.load(open(path)) for path in sys.argv[1:-1]]
    if not plot([r for f in files for r in f["results"]], files[0]["meta"], sys.argv[-1]):
        sys.exit("there is no forward or backward time in these files")
