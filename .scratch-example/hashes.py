import sys, hashlib, pathlib
root = pathlib.Path.cwd()
sys.path.insert(0, str(root / "examples"))
import jax, jax.numpy as jnp, numpy as np
import jla; print(jla.__file__)
import train_lm
from model import make_model, MIXERS
for mixer in MIXERS:
    for unroll in (False, True):
        model = make_model(mixer, 64, 2, 2, dtype="bfloat16", implementation=None if mixer=="attention" else "xla", unroll=unroll)
        optimizer, _ = train_lm.make_optimizer(240, 4e-3, 0.1)
        state = jax.eval_shape(lambda: train_lm.initialise(model, optimizer, 0))
        text = train_lm.train_step.lower(state, jax.ShapeDtypeStruct((4, 65), jnp.int32), model=model, optimizer=optimizer).as_text()
        fwd = train_lm.forward.lower(state["params"], jax.ShapeDtypeStruct((4, 64), jnp.int32), model=model).as_text()
        print(mixer, unroll, hashlib.sha256(text.encode()).hexdigest()[:16], hashlib.sha256(fwd.encode()).hexdigest()[:16], flush=True)
