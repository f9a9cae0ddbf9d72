"""What the pages of docs/ show of benchmarks/results: README's sections and those of
benchmarks/README with links of these pages, and what each mixer costs."""

import re

from benchmarks import model_tables, readme_tables
from benchmarks.model_tables import origin, paragraph, rows_of, sources, table


def on_page(text):
    """A section of README or of benchmarks/README, with the links and pictures of a page of docs/.

    README's links are references, such as [KDA][docs/kda.md] and [docs/jax.md]."""
    text = re.sub(r"\[([^\]]+)\]\[docs/([\w/.]+)\]", r"[\1](\2)", text)
    text = re.sub(r"\[docs/([\w/.]+)\](?![(\[])", r"[\1](\1)", text)
    # Where numbers are from, without the commands: the file has them.
    text = re.sub(r"(?m)^(- \[[\w.-]+\.json\]\(.*?\d{4}-\d\d-\d\d); .*$", r"\1", text)
    text = text.replace("](results/", "](../benchmarks/results/")
    for folder in (readme_tables.PICTURES, model_tables.PICTURES):
        text = text.replace(folder, "pictures/")
    return text


def picture(folder):
    return on_page(readme_tables.speed_picture(folder))


def choice(folder):
    return on_page(readme_tables.choice(folder))


def behind(found, folder):
    return on_page(readme_tables.behind(found, folder))


def speeds(found):
    return on_page(readme_tables.speeds(found))


def recall(folder):
    return on_page(model_tables.recall(folder))


def costs(folder):
    """Training, reading and sampling of whole models, one line for each mixer."""
    prompts, trained = readme_tables.whole_models(folder)
    rows, used = rows_of(folder / "generation.json")
    sampled = {
        (row["mixer"], row["batch"]): row["tokens_per_s"] for row in rows if "step_ms" in row
    }
    batches = sorted({batch for _, batch in sampled})
    lines = [
        row
        | dict(prefill=prompts[mixer]["prefill_tokens_per_s"], state=prompts[mixer]["state_bytes"])
        | {f"at_{batch}": sampled.get((mixer, batch)) for batch in batches}
        for mixer, row in trained.items()
    ]
    one, prompt = trained["kda"], prompts["kda"]
    about = f"""
        Models of width {one["width"]}, {one["depth"]} blocks and {one["heads"]} heads, bfloat16, on
        one GPU. Training on windows of {one["length"]:,} tokens, {one["batch_per_gpu"]} at once,
        and the memory it takes. Reading a prompt of {prompt["prompt"]:,} tokens; sampling behind
        it; the state of a sequence that holds it."""
    columns = {
        "million parameters": ("parameters", 1e-6, "{:.1f}"),
        "training, tokens/s": ("tokens_per_s", 1, "{:,.0f}"),
        "memory, GiB": ("memory_gib", 1, "{:.1f}"),
        "prompt, tokens/s": ("prefill", 1, "{:,.0f}"),
        **{f"sampling {b}, tokens/s": (f"at_{b}", 1, "{:,.0f}") for b in batches},
        "state, MiB": ("state", 2**-20, "{:.1f}"),
    }
    used += sources({origin("language_model.json", row["meta"]) for row in trained.values()})
    return on_page("\n".join([paragraph(about), "", *table(lines, columns), "", *used]))
