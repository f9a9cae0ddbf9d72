"""The programs' pictures: a loss curve, and recall against the number of pairs."""

import math

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt


def plot_losses(lines, baselines, path):
    """Draws the lines of metrics.jsonl, with the byte models' bits per byte as level lines."""
    training = [(line["step"], line["loss"] / math.log(2)) for line in lines if "loss" in line]
    held_out = [
        (line["step"], line["held_out_bits_per_byte"])
        for line in lines
        if "held_out_bits_per_byte" in line
    ]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(*zip(*training, strict=True), color="tab:blue", lw=0.8, label="training, each step")
    axes.plot(*zip(*held_out, strict=True), "o-", color="tab:red", label="held-out text")
    for (name, bits), style in zip(baselines.items(), (":", "--"), strict=True):
        axes.axhline(bits, color="0.4", ls=style, lw=1, label=f"{name} model ({bits:.2f})")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_recall(results, title, path):
    """Draws each mixer's accuracy against the number of pairs, from the rows of recall.py."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    counts = sorted({row["pairs"] for row in results})
    for i, mixer in enumerate(dict.fromkeys(row["mixer"] for row in results)):
        line = {row["pairs"]: row["accuracy"] for row in results if row["mixer"] == mixer}
        style = dict(marker="osD^vPX"[i % 7], ls="--" if mixer == "attention" else "-", alpha=0.8)
        axes.plot(*zip(*sorted(line.items()), strict=True), label=mixer, **style)
    guess = [1 / count for count in counts]
    axes.plot(counts, guess, color="0.4", ls=":", lw=1, label="one of the values")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="key-value pairs", ylabel="accuracy at the queries", ylim=(-0.03, 1.03))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
