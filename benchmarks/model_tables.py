"""The tables of whole models in benchmarks/README, from what language_model.py, generation.py,
serving.py and the recall example wrote; and what all tables are made with."""

import json
import re
import textwrap

PICTURES = "../docs/pictures/"  # seen from benchmarks/README
NAMES = {
    "kda": "kda",
    "gsa": "gsa",
    "log_linear": "log_linear_attention",
    "path": "path_attention",
    "path_fox": "path_attention` with gates `g",
    "mesa": "mesa_net",
}
HYBRID = "3 `kda` : 1 `path_attention`"


def origin(file, meta):
    """What `sources` says of a file: (file, card, versions, date, command or where it is from)."""
    versions = ", ".join(
        f"{name} {version}"
        for name, version in [("JAX", meta.get("jax")), *meta.get("versions", {}).items()]
        if version
    )
    command = re.sub(r" --(out|plot) [^ ]+", "", meta.get("command", ""))
    made = [f"`{command}`"] if command else []
    if "source" in meta:
        made.append(meta["source"])
    return file, meta["card"], versions, meta["date"][:10], "; ".join(made)


def sources(used):
    """A line for each of the files that `origin` described, with all its commands."""
    commands = {}
    for *run, made in sorted(used):
        commands.setdefault(tuple(run), []).append(made)
    for (file, card, versions, date), made in commands.items():
        yield f"- [{file}](results/{file}): {card}, {versions}, {date}; {', '.join(made)}"


def header(titles):
    """A table's first two lines."""
    titles = list(titles)
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]


def picture(folder, name, alt):
    """A picture of docs/pictures that follows the page's colours."""
    return f"""<picture>
  <source media="(prefers-color-scheme: dark)" srcset="{folder}{name}_dark.svg">
  <img alt="{alt}" src="{folder}{name}_light.svg">
</picture>"""


def language_models(folder):
    """What benchmarks.language_model has found; empty without its file in this folder."""
    rows, used = rows_of(folder / "language_model.json")
    rows = [row for row in rows if "tokens_per_s" in row and "mesh" not in row]
    rows = [row | derived(row, rows) for row in rows]
    if not rows:
        return ""
    one = min(rows, key=lambda row: row["gpus"])
    about = f"""
        A byte-level model of width {one["width"]}, {one["depth"]} blocks and {one["heads"]} heads,
        trained in bfloat16 by examples/train_lm.py's step on windows of {one["length"]} bytes,
        {one["batch_per_gpu"]} for each GPU, of the {one["text"]}. MFU: operations of the matrix
        products and of the mixers' definitions, of 989 TFLOP/s. Then the shares of a GPU's time:
        matrix products and kernels (ours, cuDNN's), and all else but communication. Last, the speed
        of each of several GPUs beside one alone. The losses in the file are of a few steps, and
        show that training runs: they do not compare the mixers."""
    columns = {
        "million parameters": ("parameters", 1e-6, "{:.1f}"),
        "tokens/s": ("tokens_per_s", 1, "{:,.0f}"),
        "MFU": ("utilisation", 100, "{:.1f}%"),
        "memory GiB": ("memory_gib", 1, "{:.1f}"),
        "products, kernels": ("useful", 100, "{:.1f}%"),
        "all else": ("rest", 100, "{:.1f}%"),
        "scaling": ("scaling", 100, "{:.1f}%"),
    }
    drawn = picture(PICTURES, "language_model", "Speeds of the models in training")
    return "\n".join([paragraph(about), "", *table(rows, columns), "", drawn, "", *used])


def derived(row, rows):
    """The profile's shares; of several GPUs the speed of each beside that of one alone."""
    found = {}
    if row["gpus"] > 1:
        same = ("mixer", "batch_per_gpu", "length", "width", "depth", "heads")
        alone = [r for r in rows if r["gpus"] == 1 and all(r.get(k) == row[k] for k in same)]
        speed = alone[0].get("tokens_per_s") if alone else None
        if speed:
            found = dict(scaling=row["tokens_per_s"] / (row["gpus"] * speed))
    if not row.get("profile"):
        return found
    share = row["profile"]["share"]
    useful = share["products"] + share["kernels"] + share["attention"]
    return found | dict(useful=useful, rest=share["rest"])


def generation(folder):
    """What benchmarks.generation has found; empty without its file in this folder."""
    rows, used = rows_of(folder / "generation.json")
    prompts = [row for row in rows if "prefill_ms" in row]
    if not prompts:
        return ""
    about = f"""
        The same models, untrained: a prompt of {prompts[0]["prompt"]} tokens, read at once, then
        tokens sampled one by one in one jitted scan. The prompt is read as a batch of one, and its
        cache repeated for larger batches. State: what a sequence keeps of the prompt."""
    speeds = {(r["mixer"], r["batch"]): r["tokens_per_s"] for r in rows if "step_ms" in r}
    columns = {"prompt, tokens/s": ("prefill_tokens_per_s", 1, "{:,.0f}")}
    for batch in sorted({batch for _, batch in speeds}):
        columns[f"sampling, batch {batch}, tokens/s"] = (f"at_{batch}", 1, "{:,.0f}")
        prompts = [r | {f"at_{batch}": speeds.get((r["mixer"], batch))} for r in prompts]
    columns["state, MiB a sequence"] = ("state_bytes", 2**-20, "{:.1f}")
    drawn = picture(PICTURES, "decode", "Speeds of sampling, and the states' sizes")
    return "\n".join([paragraph(about), "", *table(prompts, columns), "", drawn, "", *used])


def serving(folder):
    """What benchmarks.serving has found; empty without its file in this folder."""
    rows, used = rows_of(folder / "serving.json")
    rows = [row | latencies(row) for row in rows if "new_tokens_per_s" in row]
    if not rows:
        return ""
    one = rows[0]
    least, most = one["prompt_length"]
    about = f"""
        The same models behind examples/serve.py: {one["requests"]} requests, all there from the
        start, with prompts of {least} to {most} tokens and {one["new_tokens"] // one["requests"]}
        new tokens each, of which {one["slots"]} run at once. A prefill has room for {one["chunk"]}
        tokens of {one["rows"]} prompts, packed or in rows, beside each decoding step. Times are
        median / 99th percentile, as the host sees them; that to the first token counts from the
        start, and is mostly the queue. Memory: parameters, the pool and temporaries."""
    columns = {
        "prompts": ("prefill", 1, "{}"),
        "new tokens/s": ("new_tokens_per_s", 1, "{:,.0f}"),
        "prompt tokens/s": ("prompt_tokens_per_s", 1, "{:,.0f}"),
        "to first token, s": ("first_token", 1, "{}"),
        "without the queue, s": ("reading", 1, "{}"),
        "between tokens, ms": ("between_tokens", 1, "{}"),
        "memory GiB": ("memory_gib", 1, "{:.1f}"),
        "slot, MiB": ("slot_mib", 1, "{:.1f}"),
    }
    return "\n".join([paragraph(about), "", *table(rows, columns), "", *used])


def latencies(row):
    """The latencies of a row of `serving` as text, which a multiplication by 1 leaves as it is."""

    def both(name, factor, form):
        return " / ".join(form.format(row[name][of] * factor) for of in ("median", "p99"))

    return dict(
        first_token=both("first_token_s", 1, "{:.2f}"),
        reading=both("reading_s", 1, "{:.2f}"),
        between_tokens=both("between_tokens_s", 1e3, "{:.2f}"),
    )


def recall(folder):
    """What examples/recall.py has found on a GPU; empty without its file in this folder."""
    path = folder / "recall_full.json"
    if not path.exists():
        return ""
    report = json.loads(path.read_text())
    settings, meta = report["settings"], report["meta"]
    rates = ", ".join(f"{lr:g}" for lr in settings["lr"])
    about = f"""
        Accuracy at the queries of sequences of {settings["length"]} tokens: width
        {settings["width"]}, {settings["depth"]} blocks, {settings["heads"]} heads,
        {settings["dtype"]}, {settings["steps"]} steps of {settings["batch"]} sequences, seed
        {settings["seed"]}; of the learning rates {rates} each mixer's best."""
    shares = {(r["mixer"], r["pairs"]): r["accuracy"] for r in report["results"]}
    found = {
        row["mixer"]: dict(mixer=row["mixer"], lr=row["lr"])
        | {f"at {n}": shares[row["mixer"], n] for n in settings["pairs"]}
        for row in report["results"]
    }
    columns = {f"{n} pairs": (f"at {n}", 1, "{:.3f}") for n in settings["pairs"]}
    columns["learning rate"] = ("lr", 1, "{:g}")
    lines = table(found.values(), columns)
    drawn = picture(PICTURES, "recall", "Accuracy against the number of pairs")
    used = sources([origin(path.name, meta)])
    return "\n".join([paragraph(about), "", *lines, "", drawn, "", *used])


def rows_of(path):
    """The rows of a file, and the lines that say where they come from; none without the file."""
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    measured = {"step_ms", "prefill_ms", "new_tokens_per_s"}
    metas = [row["meta"] for row in rows if measured & row.keys()]
    return rows, list(sources({origin(path.name, meta) for meta in metas}))


def table(rows, columns):
    """The lines of a table. `columns` is {title: (key, factor, format)}; gaps stay empty."""
    lines = header(["", *columns])
    for row in rows:
        cells = [
            form.format(row[key] * factor) if row.get(key) is not None else ""
            for key, factor, form in columns.values()
        ]
        lines.append(f"| {label(row)} | " + " | ".join(cells) + " |")
    return lines


def label(row):
    names = {name: f"`{of}`" for name, of in NAMES.items()}
    mixer, _, lazy = row["mixer"].partition(" lazy ")  # PaTH's keys in decoding, see generation.py
    name = (names | {"attention": "softmax attention", "hybrid": HYBRID})[mixer]
    keys = f", lazy keys in {lazy}" if lazy else ""
    several = f", {row['gpus']} GPUs" if row.get("gpus", 1) > 1 else ""
    return name + keys + several


def paragraph(text, width=118):
    return textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False)
