"""Results of benchmarks.quality, recall_sizes and peer_models that nobody measured."""

import json

META = dict(card="some GPU", jax="0", date="2026-01-01", command="python -m benchmarks.some")
MIXERS = ("kda", "gsa", "log_linear", "mesa", "path", "attention")


def write(folder):
    """Writes the three files; of kda's language model there are two rates and two seeds."""
    part = dict(bytes=3_000_000, sha256="0123456789abcdef0123")
    row = dict(meta=META, depth=8, width=1024, heads=8, parameters_wanted=113e6, vocabulary=8192)
    row |= dict(length=4096, batch=8, steps=1000, dtype="bfloat16", memory_gib=9.5, step_ms=50.0)
    row |= dict(parameters=113_000_000, tokens_per_s=5e5, corpus=dict(train=part, held_out=part))
    quality = []
    for i, model in enumerate((*MIXERS, "hybrid", "gsa:scale=4")):
        for lr, seed, more in ((1e-3, 0, 0.1), (3e-3, 0, 0.0), (3e-3, 1, 0.02)):
            if model != "kda" and seed:
                continue
            bits = 1.0 + 0.1 * i + more
            curve = [dict(step=500, held_out_bits_per_byte=bits + 0.5)]
            curve.append(dict(step=1000, held_out_bits_per_byte=bits))
            held_out = {"1": bits, "2": bits - 0.01, "4": bits + 0.01}
            found = dict(held_out_by_length=held_out, held_out_bits_per_byte=bits, curve=curve)
            quality.append(row | found | dict(model=model, lr=lr, seed=seed))
    recall = []
    row = dict(meta=META, depth=2, width=128, heads=2, dtype="bfloat16", steps=3000, batch=24)
    row |= dict(length=2048, pairs=[4, 8, 16], curve=[])
    for model in MIXERS:
        for key_dim in (32, 64):
            sizes = dict(key_dim=key_dim, state_bytes=2048 * key_dim)
            for lr, seed, share in ((1e-3, 0, 0.5), (3e-3, 0, 0.8), (3e-3, 1, 0.9)):
                of = dict(model=model, lr=lr, seed=seed, accuracy=[1.0, share, share / 2])
                recall.append(row | sizes | of)
    ours = dict(meta=META, mixer="kda", width=1024, depth=9, heads=8, batch_per_gpu=16)
    ours |= dict(length=4096, tokens_per_s=5e5, memory_gib=30.0, parameters=118_000_000)
    of = [["mlp/mul", 3.0, 9], ["add", 0.5, 1], ["sub", 0.25, 1]]
    ours |= dict(profile=dict(busy_ms=100.0, share=dict(rest=0.0375), passes=of))
    fla = ours | dict(precision="bfloat16", package="fla 0", tokens_per_s=2.5e5, memory_gib=40.0)
    for name, rows in dict(quality=quality, recall_sizes=recall, peer_models=[ours, fla]).items():
        (folder / f"{name}.json").write_text(json.dumps(dict(results=rows)))
