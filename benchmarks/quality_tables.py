"""The tables of what models learn, from the results of quality, recall_sizes and peer_models."""

import json
import statistics

from benchmarks.model_tables import (
    NAMES,
    PICTURES,
    header,
    label,
    origin,
    paragraph,
    picture,
    sources,
)


def quality(folder):
    """Losses of language models; empty without their file in this folder."""
    rows = [row for row in read(folder, "quality.json") if "held_out_by_length" in row]
    if not rows:
        return ""
    one = rows[0]
    text = one["corpus"]["train"]
    about = f"""
        Language models of {one["depth"]} blocks of width {one["width"]} with {one["heads"]} heads,
        the width of whose MLPs gives each about {one["parameters_wanted"] / 1e6:.0f} million
        parameters, trained once on {text["bytes"] / 1e6:.0f} million bytes of sources and
        documentation (SHA-256 `{text["sha256"][:16]}`...) in {one["vocabulary"]:,} byte pairs, by
        windows of {one["length"]:,} tokens, {one["batch"]} in a step. Bits for each byte of
        {one["corpus"]["held_out"]["bytes"] / 1e6:.1f} million bytes in other files, read in windows
        of once, twice and four times that length; of the learning rates tried the best, and its
        mean and range where there are several seeds."""
    columns = ("million parameters", "rate", "bits a byte", "twice as long", "four times", "seeds")
    columns += ("other rates", "tokens/s", "memory GiB")
    lines = header(["", *columns])
    for model, found in by_model(rows).items():
        best = best_rate(found)
        chosen = [row for row in found if row["lr"] == best]
        cells = [f"{chosen[0]['parameters'] / 1e6:.1f}", f"{best:g}"]
        for times in ("1", "2", "4"):
            cells.append(mean_and_range([row["held_out_by_length"][times] for row in chosen]))
        others = sorted({row["lr"] for row in found} - {best})
        cells += [
            str(len(chosen)),
            ", ".join(f"{lr:g}: {of_first(found, lr):.4f}" for lr in others),
        ]
        speed = statistics.median(row["tokens_per_s"] for row in chosen)
        cells += [f"{speed:,.0f}", f"{chosen[0]['memory_gib']:.1f}"]
        lines.append(f"| {title(model)} | " + " | ".join(cells) + " |")
    drawn = picture(PICTURES, "quality", "Losses of the models against tokens and against seconds")
    used = lines_of("quality.json", rows)
    return "\n".join([paragraph(about), "", *lines, "", drawn, "", *used])


def recall_sizes(folder):
    """Recall by the size of the state; empty without its file in this folder."""
    rows = [row for row in read(folder, "recall_sizes.json") if "curve" in row]
    if not rows:
        return ""
    one = rows[0]
    about = f"""
        Accuracy at the queries of sequences of {one["length"]:,} tokens: {one["depth"]} blocks of
        width {one["width"]} with {one["heads"]} heads, {one["dtype"]}, {one["steps"]:,} steps of
        {one["batch"]} sequences; the mean and range of the seeds, with the learning rate that was
        the best for the first of them. State: what decoding keeps of such a sequence."""
    lines = header(["", "features of a head", "state, KiB", *(f"{n} pairs" for n in one["pairs"])])
    for model, found in by_model(rows).items():
        for key_dim in sorted({row["key_dim"] for row in found}):
            chosen = best_seeds([row for row in found if row["key_dim"] == key_dim])
            cells = [str(key_dim), f"{chosen[0]['state_bytes'] / 2**10:,.0f}"]
            for shares in zip(*(row["accuracy"] for row in chosen), strict=True):
                cells.append(mean_and_range(shares, digits=3))
            lines.append(f"| {title(model)} | " + " | ".join(cells) + " |")
    drawn = picture(PICTURES, "recall_sizes", "Accuracy against pairs and against the state's size")
    used = lines_of("recall_sizes.json", rows)
    return "\n".join([paragraph(about), "", *lines, "", drawn, "", *used])


def reach(folder):
    """What layers see before training; empty without its file in this folder."""
    rows = [row for row in read(folder, "reach.json") if "size" in row]
    if not rows:
        return ""
    lines = header(["", "last token", "last 4", "last 16", "as many as", "output"])
    for model, (row,) in by_model(rows).items():
        cells = [f"{row[f'last_{n}']:.1%}" for n in (1, 4, 16)]
        cells += [f"{row['tokens']:.1f}", f"{row['size']:.2f}"]
        lines.append(f"| {title(model)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *lines_of("reach.json", rows)])


def peer_models(folder):
    """Training beside fla's models; empty without the file of both in this folder."""
    rows = [row for row in read(folder, "peer_models.json") if "tokens_per_s" in row]
    ours = {x["mixer"]: x for x in rows if "package" not in x and x.get("gpus", 1) == 1}
    fla = {row["mixer"]: row for row in rows if row.get("precision") == "bfloat16"}
    both = [mixer for mixer in NAMES if mixer in ours and mixer in fla]
    if not both:
        return ""
    one = ours[both[0]]
    about = f"""
        Training of the same sizes in one run on one GPU: width {one["width"]}, {one["depth"]}
        blocks, {one["heads"]} heads, {one["batch_per_gpu"]} windows of {one["length"]:,} bytes in a
        step. fla's models have bfloat16 parameters and moments, fused AdamW, and fla's fused norms,
        MLPs and losses; jla's have float32 parameters and moments."""
    columns = ("jla, tokens/s", "fla, tokens/s", "times as fast", "jla, GiB", "fla, GiB")
    columns += ("jla, million parameters", "fla's")
    lines = header(["", *columns])
    for mixer in both:
        a, b = ours[mixer], fla[mixer]
        cells = [f"{x['tokens_per_s']:,.0f}" for x in (a, b)]
        cells.append(f"{a['tokens_per_s'] / b['tokens_per_s']:.2f}")
        cells += [f"{a['memory_gib']:.1f}", f"{b['memory_gib']:.1f}"]
        cells += [f"{x['parameters'] / 1e6:.1f}" for x in (a, b)]
        lines.append(f"| {title(mixer)} | " + " | ".join(cells) + " |")
    named = [line for mixer in both for line in passes(ours[mixer])]
    used = lines_of("peer_models.json", rows)
    return "\n".join([paragraph(about), "", *lines, "", *named, *used])


def passes(row, least=0.01):
    """A line with the passes of jla's step beside products and kernels, those of a hundredth of its
    time at least by name; none without a profile."""
    profile = row.get("profile") or {}
    if "passes" not in profile:
        return
    busy = profile["busy_ms"]
    large = [(name, ms) for name, ms, _ in profile["passes"] if ms >= least * busy]
    small = sum(ms for _, ms, _ in profile["passes"]) - sum(ms for _, ms in large)
    words = [f"`{name}` {ms / busy:.1%}" for name, ms in large]
    words.append(f"{len(profile['passes']) - len(large)} others {small / busy:.1%}")
    rest = profile["share"]["rest"]
    yield f"- {label(row)}: {rest:.1%} beside products and kernels: {', '.join(words)}."


def read(folder, name):
    path = folder / name
    return json.loads(path.read_text())["results"] if path.exists() else []


def by_model(rows):
    """{model: its rows}, in the order of all tables, then the hybrid, then changed settings."""
    order = [*NAMES, "attention", "hybrid"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    models.sort(key=lambda model: order.index(model) if model in order else len(order))
    return {model: [row for row in rows if row["model"] == model] for model in models}


def title(model):
    name, *settings = model.split(":")
    return ", ".join([label(dict(mixer=name)), *(f"`{setting}`" for setting in settings)])


def of_first(rows, lr):
    """The held-out loss with this rate of its first seed."""
    found = [row for row in rows if row["lr"] == lr]
    return min(found, key=lambda row: row["seed"])["held_out_bits_per_byte"]


def best_rate(rows):
    return min({row["lr"] for row in rows}, key=lambda lr: of_first(rows, lr))


def best_seeds(rows):
    """Of one model of recall_sizes the rows with the rate that was the best for its first seed."""
    first = min(row["seed"] for row in rows)
    of = {row["lr"]: sum(row["accuracy"]) for row in rows if row["seed"] == first}
    best = max(of, key=of.get)
    return [row for row in rows if row["lr"] == best]


def mean_and_range(values, digits=4):
    text = f"{statistics.mean(values):.{digits}f}"
    low, high = min(values), max(values)
    return text if low == high else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def lines_of(name, rows):
    """The lines that say where a file's rows are from."""
    return sources({origin(name, row["meta"]) for row in rows})
