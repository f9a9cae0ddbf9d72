import sys, time

sys.path[:0] = ["tests", "tests/contract"]
import blas, jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
import harness
from mechanisms import MECHANISMS

for lim in (100, 0, 100, 0):
    jax.config.update("jax_traceback_in_locations_limit", lim)
    tt = tl = 0
    for m in MECHANISMS:
        if m.name not in ("kda", "gsa", "path"):
            continue
        im = m.form("xla")
        args, ct = harness.inputs(m, im.sizes)
        ids = harness.one_segment(im, im.sizes)
        jax.clear_caches()
        harness._forward.cache_clear()
        harness._value_and_vjp.cache_clear()
        f = harness._value_and_vjp(m.name, "xla")
        c = time.process_time()
        t = f.trace(args, ct, ids)
        tt += time.process_time() - c
        c = time.process_time()
        t.lower()
        tl += time.process_time() - c
    print(lim, round(tt, 2), round(tl, 2), flush=True)
