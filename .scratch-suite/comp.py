import sys, time, itertools

sys.path[:0] = ["tests", "tests/contract"]
import blas, jax, os
import numpy as np

N = int(os.environ.get("NDEV", "8"))
jax.config.update("jax_num_cpu_devices", N)
jax.config.update("jax_disable_most_optimizations", True)
import harness
from mechanisms import MECHANISMS

progs = []
for m in MECHANISMS:
    if m.name not in ("kda", "gsa"):
        continue
    im = m.form("xla")
    args, ct = harness.inputs(m, im.sizes)
    ids = harness.one_segment(im, im.sizes)
    low = harness._value_and_vjp(m.name, "xla").lower(args, ct, ids)
    progs.append((m.name, low))
variants = {"base": {}}
for s in sys.argv[1:]:
    k, v = s.split("=")
    v = {"true": True, "false": False}.get(v, v)
    try:
        v = int(v) if not isinstance(v, bool) else v
    except ValueError:
        pass
    variants[s] = {k: v}
tot = {k: [] for k in variants}
i = 0
for rnd in range(4):
    for k, opt in variants.items():
        t = 0
        for n, low in progs:
            i += 1
            o = dict(opt)
            c = time.process_time()
            try:
                low.compile(o) if o else low.compile({"xla_backend_optimization_level": 0})
            except Exception as e:
                print(k, str(e)[:200])
                break
            t += time.process_time() - c
        tot[k].append(t)
for k, v in tot.items():
    print(k, [round(x, 2) for x in v])
