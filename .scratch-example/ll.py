import sys,os; sys.path[:0] = [os.getcwd(), os.getcwd()+"/tests", os.getcwd()+"/tests/contract"]
import jax, jax.numpy as jnp, jla, jla.pallas
f=jnp.float32; S=jax.ShapeDtypeStruct
st=jla.LogLinearState(S((2,2,5,16,16),f),S((2,),jnp.int32))
a=(S((2,1,16),f),S((2,1,16),f),S((2,2,16),f),S((2,2),f),S((2,2,5),f),st)
with jla.pallas.interpret(): print(jax.make_jaxpr(lambda *a: jla.log_linear_step(*a,implementation="pallas"))(*a))
