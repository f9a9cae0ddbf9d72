import os,sys,re
sys.path[:0]=[os.getcwd(),os.getcwd()+"/tests",os.getcwd()+"/tests/contract"]
import jax, jax.numpy as jnp, numpy as np, jla, jla.pallas
from test_pools import arguments, stepping
from mechanisms import MECHANISMS
import jla._dispatch as d
jla.pallas.unsupported_device=lambda: None
for m in MECHANISMS:
    i=m.form("pallas").compiled()
    slots=np.array([2,-1,0],np.int32)
    t,s,p=arguments(m,i,dict(i.full)|dict(T=1),slots,4)
    step=stepping(m,i,s)
    for x in ("lazy",) if m.name=="log_linear" else ("",):
        pp=jax.tree.map(jnp.asarray,p).lazy() if x else p
        for q in ((p,pp) if x else (p,)):
            text=jax.jit(step,donate_argnums=1).trace(t,q,slots).lower(lowering_platforms=("cuda",)).as_text()
            n=len(jax.tree.leaves(q))
            print(m.name,x,text.count("tf.aliasing_output"),n,re.findall(r"output_operand_aliases.*?\]>?\]",text)[:2] , [re.findall(r"operand_index = \d+",l) for l in text.splitlines() if "@mosaic_gpu" in l],flush=True)
