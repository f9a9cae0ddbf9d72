"""The loss curve as a picture."""

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
