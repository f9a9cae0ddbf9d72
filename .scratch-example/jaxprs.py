"""Hashes of programs without slots: run from this root and from /work/main, compare."""
import sys, os, hashlib, re
sys.path[:0] = [os.getcwd(), os.getcwd()+"/tests", os.getcwd()+"/tests/contract", os.getcwd()+"/tests/linen"]
import jax, jax.numpy as jnp
import jla, jla.pallas
from mechanisms import MECHANISMS
from harness import shapes
from jla.models import *
def h(text): return hashlib.sha256(re.sub(r"0x[0-9a-f]+","",text).encode()).hexdigest()[:12]
for m in MECHANISMS:
    for i in m.implementations:
        for sizes in (i.sizes,):
            args=shapes(m,dict(sizes)|dict(T=1),i.dtypes[0])
            tok=m.tokenwise(); st=m.state[0]
            one={}
            for n,x in args.items():
                if n in tok: x=jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0],*x.shape[2:]),x.dtype),x)
                one[m.state[1] if n==st else n]=x
            try:
                with i.context():
                    j=jax.make_jaxpr(lambda a: m.step(**a, implementation=i.name))(one)
                print(m.name,i.name,h(str(j)),len(str(j)))
            except Exception as e: print(m.name,i.name,type(e),str(e)[:200])
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
for n,l in layers.items():
    model=LanguageModel(Config(64,width=32,layers=(Layer(l,SwiGLU(64)),)))
    t=jax.ShapeDtypeStruct((2,5),jnp.int32); mask=jax.ShapeDtypeStruct((2,5),bool)
    p=jax.eval_shape(model.init,jax.random.key(0),t)["params"]
    j=jax.make_jaxpr(lambda p,t,mask: generate(model,p,t,mask=mask,max_new_tokens=4))(p,t,mask)
    j2=jax.make_jaxpr(jax.grad(lambda p,t: model.apply({"params":p},t).sum()))(p,t)
    print(n,h(str(j)),h(str(j2)))
