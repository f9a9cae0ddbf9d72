import jax, jax.numpy as jnp, numpy as np, jla, sys
from jla.models import *
print(jla.__file__)
rng=np.random.default_rng(0)
layers={
 'kda': jla.linen.KimiDeltaAttention(num_heads=2),
 'gsa': jla.linen.GatedSlotAttention(num_heads=2,conv_size=4,num_slots=16),
 'll': jla.linen.LogLinearMamba2(num_heads=2,key_dim=16,value_dim=16,num_levels=6),
 'mesa': jla.linen.MesaNet(num_heads=2),
 'path': jla.linen.PaTHAttention(num_heads=2,use_forget_gate=True),
 'attn': Attention(num_heads=2),
 'gqa': Attention(num_heads=2,num_key_heads=1,window=4),
 'mla': LatentAttention(num_heads=2,latent_dim=16,nope_dim=16,rope_dim=8,value_dim=16,rope_theta=1e4),
}
which=sys.argv[1:] or list(layers)
for name in which:
    m=layers[name].clone(decode=True)
    D,R=32,5
    x=jnp.asarray(rng.standard_normal((R,20,D)),jnp.float32)
    v=m.init(jax.random.key(0),x)
    params=v['params']
    run=jax.jit(lambda c,x,mask,slots: m.apply({'params':params,'cache':c},x,mask=mask,slots=slots,mutable=['cache']))
    plain=jax.jit(lambda c,x,mask: m.apply({'params':params,'cache':c},x,mask=mask,mutable=['cache']))
    pool=jax.tree.map(lambda a: jnp.full(a.shape,jnp.nan,a.dtype) if jnp.issubdtype(a.dtype,jnp.floating) else jnp.full_like(a,7), v['cache'])
    pool0=pool
    slots=np.array([3,-1,0],np.int32)
    pool=jla.linen.clear(pool,slots)
    one=jax.tree.map(lambda a:a[:3]*0,v['cache'])
    mask=np.ones((3,7),bool); mask[0,4:]=False; mask[2,:2]=False
    xs=jnp.asarray(rng.standard_normal((3,7,D)),jnp.float32)
    bad=xs.at[1].set(jnp.nan)
    y,c=run(pool,bad,mask,slots); pool=c['cache']
    y0,c0=plain(one,xs,mask); one=c0['cache']
    for t in range(3):
        print(name,'T',xs.shape[1],[bool((y[i]==y0[i]).all()) for i in (0,2)], float(jnp.abs(y-y0)[jnp.array([0,2])].max()), bool((y[1]==0).all()),
          jax.tree.all(jax.tree.map(lambda p,q: np.allclose(p[3],q[0],atol=1e-6) and np.allclose(p[0],q[2],atol=1e-6),pool,one)),
          jax.tree.all(jax.tree.map(lambda p,q: np.array_equal(np.asarray(p)[[1,2,4]],np.asarray(q)[[1,2,4]],equal_nan=True),pool,pool0)))
        xs=jnp.asarray(rng.standard_normal((3,1,D)),jnp.float32); bad=xs.at[1].set(jnp.nan)
        mask=None if t==0 else np.array([[True],[True],[t!=1]])
        y,c=run(pool,bad,mask,slots); pool=c['cache']
        y0,c0=plain(one,xs,mask); one=c0['cache']
