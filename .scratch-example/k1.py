import os,sys
sys.path[:0]=[os.getcwd()+"/tests",os.getcwd()]
import jax, jax.numpy as jnp, numpy as np, jla, jla.pallas
from test_pallas_step import arguments
args=tuple(map(jnp.asarray,arguments(B=3,H=1,HV=2,K=16,V=32,dtype=jnp.bfloat16)))
R=5
pool=jnp.asarray(np.random.default_rng(0).standard_normal((R,2,16,32)),jnp.float32).at[1].set(jnp.nan)
slots=jnp.array([4,-1,0],jnp.int32)
bad=tuple(x.at[1].set(jnp.nan) for x in args[:5])
with jla.pallas.interpret():
    o,new=jax.jit(lambda *a: jla.kda_step(*a,slots=slots,implementation="pallas"))(*bad,pool)
    o0,n0=jax.jit(lambda *a: jla.kda_step(*a,implementation="pallas"))(*args[:5],pool[jnp.array([4,2,0])])
print(o.shape,(o[0]==o0[0]).all(),(o[2]==o0[2]).all(),(o[1]==0).all(),(new[4]==n0[0]).all(),(new[0]==n0[2]).all(),np.array_equal(new[1:4],pool[1:4],equal_nan=True))
sh=jax.eval_shape(lambda:(*args[:5],pool))
for B,R,HV,K,V in ((3,5,2,16,32),(128,1024,16,128,128)):
    SDS=jax.ShapeDtypeStruct; b=jnp.bfloat16; f=jnp.float32
    a=(SDS((B,HV,K),b),SDS((B,HV,K),b),SDS((B,HV,V),b),SDS((B,HV,K),f),SDS((B,HV),f),SDS((R,HV,K,V),f),SDS((B,),jnp.int32))
    from jla.pallas.kda import kda_step
    t=jax.jit(lambda *a: kda_step(*a[:6],scale=1.0,slots=a[6]),donate_argnums=5).trace(*a).lower(lowering_platforms=("cuda",)).as_text()
    print([l[:300] for l in t.splitlines() if "mosaic_gpu" in l and "alias" in l][0][-200:], "tf.aliasing_output" in t)
