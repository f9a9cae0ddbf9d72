"""Every step on a pool: kernels under the interpreter against steps of gathered rows; lowers for CUDA."""
import os,sys
sys.path[:0]=[os.getcwd(),os.getcwd()+"/tests",os.getcwd()+"/tests/contract"]
import jax, jax.numpy as jnp, numpy as np, jla, jla.pallas
from mechanisms import MECHANISMS
from harness import inputs
names=sys.argv[1].split(",") if len(sys.argv)>1 else ["pallas","xla","reference"]
def pool_of(mech,impl,sizes,R):
    a,_=inputs(mech,dict(sizes)|dict(B=R),impl.dtypes[0],seed=1); return a[mech.state[0]]
for m in MECHANISMS:
    if len(sys.argv)>2 and m.name not in sys.argv[2].split(","): continue
    for i in m.implementations:
        if i.name not in names: continue
        B,R=3,5
        args,_=inputs(m,dict(i.sizes)|dict(B=B),i.dtypes[0])
        pool=jax.tree.map(np.array,pool_of(m,i,i.sizes,R))
        tok={n:args[n][:,0] for n in m.tokenwise()}; sh={n:args[n] for n in m.shared()}
        slots=np.array([4,-1,0],np.int32)
        bad={n:x.copy() for n,x in tok.items()}
        for x in bad.values(): x[1]=np.nan
        pool=jax.tree.map(lambda x: x if x.dtype==np.int32 else np.where((np.arange(R)==2).reshape(-1,*[1]*(x.ndim-1)),np.nan,x),pool)
        st=m.state[1]
        with i.context():
            run=jax.jit(lambda t,p,s: m.step(**t,**sh,**{st:p},slots=s,implementation=i.name))
            o,new=jax.device_get(run(bad,pool,slots))
            ref=jax.jit(lambda t,p: m.step(**t,**sh,**{st:p},implementation=i.name))
            rows=jax.tree.map(lambda x:x[[4,1,0]],pool)
            o0,n0=jax.device_get(ref(tok,rows))
        eq=lambda a,b: np.array_equal(a,b,equal_nan=True)
        print(m.name,i.name,eq(o[0],o0[0]),eq(o[2],o0[2]),not np.any(np.asarray(o[1],np.float32)!=0),
          jax.tree.all(jax.tree.map(lambda a,b:eq(a[4],b[0]) and eq(a[0],b[2]),new,n0)),
          jax.tree.all(jax.tree.map(lambda a,b:eq(a[1:4],b[1:4]),new,pool)),flush=True)
