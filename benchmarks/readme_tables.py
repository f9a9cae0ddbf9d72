"""What README shows of benchmarks/results: which mixer to take, times beside other packages, and
where those are ahead. Links and pictures have whole addresses: a package index shows README too."""

import inspect
import json
import re

from benchmarks.model_tables import header, paragraph, picture
from jla import mesa_net
from jla.linen import LogLinearMamba2

REPOSITORY = "https://github.com/jla-authors/jla"
FILES = f"{REPOSITORY}/blob/main/"
PICTURES = f"{REPOSITORY}/raw/main/docs/pictures/"

# What no file of results knows: name, layer, page, when, cost, longest sequence, kernels.
CAPACITY = "any; in decoding, the cache's"
LEVELS = f"{2 ** (LogLinearMamba2.num_levels - 1):,} unless `num_levels` is set"
MIXERS = {
    "kda": (
        "KDA",
        "`KimiDeltaAttention`",
        "docs/kda.md",
        "in doubt: it has the smallest state, and Kimi Linear uses it",
        "T",
        "any",
        "NVIDIA, from Ampere on",
    ),
    "gsa": (
        "GSA",
        "`GatedSlotAttention`",
        "docs/gsa.md",
        "you want a softmax over a few slots instead of all tokens; pass `conv_size=4`",
        "T",
        "any",
        "NVIDIA, from Ampere on",
    ),
    "mesa": (
        "MesaNet",
        "`MesaNet`",
        "docs/mesa_net.md",
        "recall matters most and the state must not grow",
        "T, for each iteration",
        "any",
        "NVIDIA, from Ampere on",
    ),
    "log_linear": (
        "Log-linear",
        "`LogLinearMamba2`",
        "docs/log_linear.md",
        "training must be fast and the longest length is known",
        "T log T",
        LEVELS,
        "NVIDIA, from Ampere on",
    ),
    "path": (
        "PaTH",
        "`PaTHAttention`",
        "docs/path_attention.md",
        "you want softmax attention with positions that depend on the data, at moderate lengths",
        "T²",
        CAPACITY,
        "NVIDIA, from Ampere on",
    ),
    "attention": (
        "Softmax",
        "JAX's",
        None,
        "sequences are short, or nothing may be forgotten",
        "T²",
        CAPACITY,
        "cuDNN's",
    ),
}
CG_STEPS = inspect.signature(mesa_net).parameters["cg_steps"].default
PEERS = ("fla", "jax-linear-attention")
TRITON = {
    "triton": '`"triton"`',
    "triton as sm_80": "compiled for 8.0",
    "triton as sm_89": "compiled for 8.9",
}


def speed_picture(_):
    alt = (
        "Time of forward and backward for each token against the length of the sequence: it hardly "
        "changes for KDA, GSA, MesaNet and log-linear attention, and grows for PaTH"
    )
    return picture(PICTURES, "speed", alt)


def choice(folder):
    """The table to choose by."""
    prompts, _ = whole_models(folder)
    report = json.loads((folder / "recall_full.json").read_text())
    settings = report["settings"]
    pairs = max(settings["pairs"])
    recalled = {r["mixer"]: r["accuracy"] for r in report["results"] if r["pairs"] == pairs}
    one = prompts["kda"]
    lines = header(
        ("Mixer", "Take it when", "State", "Recall", "Cost", "Longest", "Kernels", "Layer")
    )
    for mixer, (name, layer, page, when, cost, longest, kernels) in MIXERS.items():
        grows = ", grows" if cost == "T²" else ""
        state = f"{prompts[mixer]['state_bytes'] / 2**20:.1f}\u00a0MiB{grows}"
        recall = f"{100 * recalled[mixer]:.1f}%"
        if page:
            name, layer = f"[{name}][{page}]", f"[{layer}][docs/layers.md]"
        cells = (name, when, state, recall, cost, longest, kernels, layer)
        lines.append("| " + " | ".join(cells) + " |")
    about = f"""
        T: the tokens of a sequence. State: what a sequence keeps while decoding, after
        {one["prompt"]:,} tokens, in {one["depth"]} blocks of {one["heads"]} heads of
        {one["width"] // one["heads"]}. Recall: of {pairs} key-value pairs in
        {settings["length"]} tokens, by {settings["depth"]} blocks of width {settings["width"]},
        from one seed; GSA with its convolution."""
    return "\n".join([*lines, "", paragraph(about)])


def speeds(found):
    """Forward / forward + backward, beside other packages."""
    versions = {
        peer: version
        for _, meta, _ in found.values()
        for peer, version in meta.get("versions", {}).items()
    }
    row, meta, _ = found["kda", "main", "forward", "pallas"]
    slots = found["gsa", "main", "forward", "pallas"][0]["M"]
    fla, peer = (f"{peer} {versions[peer]}" for peer in PEERS)
    titles = ["", "jla", *(TRITON.values()), fla, "others", peer]
    lines = header(titles)
    rows = {
        "KDA": ("kda", "", "FlashKDA"),
        "GSA": ("gsa", "", None),
        "MesaNet": ("mesa", "", None),
        "MesaNet, all iterations": ("mesa", "forced_", None),
        "Log-linear": ("log_linear", "", None),
        "PaTH": ("path", "", None),
        "PaTH with gates": ("path_fox", "", None),
    }
    for title, (mechanism, how, other) in rows.items():
        # fla always makes all iterations; ours may stop early.
        fla = "fla" if mechanism != "mesa" or how else None
        of = [times(found, mechanism, who, how) for who in ("pallas", *TRITON)]
        of += [times(found, mechanism, who) for who in (fla, other, "jax-linear-attention")]
        best = [min((t[i] for t in of if t[i]), default=None) for i in range(2)]
        cells = [cell(t, best) for t in of]
        if other:
            cells[-2] = f"{other}: {cells[-2]}"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    softmax = cell(times(found, "kda", "cudnn attention"), (None, None))
    lines.append(f"| Softmax attention | {'| ' * len(TRITON)}| | cuDNN: {softmax} | |")
    about = f"""
        Milliseconds of forward / forward + backward on an {meta["card"]}; {row["dtype"]},
        B={row["B"]} T={row["T"]} H={row["H"]} K=V={row["D"]}; GSA with {slots} slots, log-linear
        with one key head, KDA with norms and gates in its kernels. Bold: the fastest. Empty: not
        measured. MesaNet's solver stops where it has converged; fla's makes {CG_STEPS} iterations.
        Peers' times, but cuDNN's, are from notes."""
    return "\n".join([*lines, "", paragraph(about)])


def times(found, mechanism, implementation, how=""):
    """Milliseconds of forward and of forward + backward, None where there is no row."""
    keys = ((mechanism, "main", how + what, implementation) for what in ("forward", "backward"))
    return [found[key][0]["ms"] if key in found else None for key in keys]


def cell(times, best):
    if not any(times):
        return ""
    shown = [f"{t:.2f}" if t else "none" for t in times]
    bold = (f"**{s}**" if t and t == b else s for s, t, b in zip(shown, times, best, strict=True))
    return "\u00a0/\u00a0".join(bold)  # no line breaks there


def behind(found, folder):
    """Where something else is ahead of jla."""
    prompts, trained = whole_models(folder)

    def of(measure, key, *whose):
        return [found["kda", "main", measure, who][0][key] for who in whose]

    flash, ours, xla = of("forward", "ms", "FlashKDA", "pallas", "xla")
    (note,) = of("forward", "note", "FlashKDA")
    memory, less = of("backward", "memory_gib", "pallas", "cudnn attention")
    (first,) = of("backward", "first_call_s", "pallas")
    length = trained["kda"]["length"]
    path, softmax = (prompts[m]["prefill_tokens_per_s"] for m in ("path", "attention"))
    tree = found["log_linear", "step", "step16_bare", "pallas"][0]
    state = found["kda", "step", "step16_bare", "pallas"][0]
    lines = (
        f"""FlashKDA's forward pass takes {flash / ours:.0%} of the time of KDA's here ({note}).""",
        f"""At {length:,} tokens softmax attention is no slower. A language model trains at
        {trained["attention"]["tokens_per_s"]:,.0f} tokens/s with it and at
        {trained["kda"]["tokens_per_s"]:,.0f} with KDA; in the table's case cuDNN needs
        {less:.2f} GiB for forward + backward, KDA {memory:.2f}.""",
        f"""PaTH reads a prompt into its cache at {path:,.0f} tokens/s, softmax attention at
        {softmax:,.0f}.""",
        f"""A decoding step of log-linear attention takes {tree["ms"]:.2f} ms for
        {tree["B"]} sequences, one of KDA {state["ms"]:.2f}.""",
        f"""Without kernels KDA's forward pass takes {xla:.1f} ms in place of {ours:.1f}.""",
        f"""The first call compiles: {first:.0f} s for KDA's gradients. [docs/jax.md] says what
        helps.""",
    )
    return "\n".join(bullet(line) for line in lines)


def bullet(text):
    first, *rest = paragraph(text, 116).splitlines()
    return "\n".join([f"- {first}", *(f"  {line}" for line in rest)])


def whole_models(folder):
    """{mixer: row} of the prompts of generation.json, and of language_model.json on one GPU."""
    prompts, trained = (
        json.loads((folder / name).read_text())["results"]
        for name in ("generation.json", "language_model.json")
    )
    return (
        {row["mixer"]: row for row in prompts if "prefill_ms" in row},
        {row["mixer"]: row for row in trained if row.get("gpus") == 1 and "tokens_per_s" in row},
    )


def links(readme):
    """Where the text's references lead: [docs/kda.md] is that file in the repository."""
    named = set(re.findall(r"\[([\w./-]+\.(?:md|py))\](?!: http)", readme))
    return "\n".join(f"[{path}]: {FILES}{path}" for path in sorted(named))
