import os, sys
os.environ.update(TRITON_INTERPRET="1", JAX_PLATFORMS="cpu")
sys.path[:0]=["tests/contract","tests","tests/triton","."]
import numpy as np, dataclasses
import interpreter, triton_interpreter as TI
interpreter.mend(); TI.repair(); TI.hasten()
import harness
from mechanisms import MECHANISMS
kda=[m for m in MECHANISMS if m.name=="kda"][0]
impl=kda.form("triton")
sizes=dict(impl.sizes)|dict(T=int(os.environ.get("T","500")),K=int(os.environ.get("K","128")),V=int(os.environ.get("V","128")),H=1,HV=int(os.environ.get("HV","1")))
args,cot=harness.inputs(kda,sizes,"float32")
args=kda.stress["equal keys, beta = 2"](args) if os.environ.get("EQ","1")=="1" else args
want=harness.definition(kda,args,cot)
import jla.triton.kernels.kda_forward as F, jla.triton.kernels.kda_backward as B
from triton.runtime import interpreter as I
import triton.language as tl
from triton._C.libtriton import ir
EXACT=set(); 
import jla.triton.kernels.pieces as P
orig=I.InterpreterBuilder.create_dot
def create_dot(self,a,b,d,prec,m):
    if prec==ir.INPUT_PRECISION.BF16x3 and a.data.dtype==np.float32:
        f=sys._getframe(); names=set()
        while f is not None:
            names.add(f.f_code.co_name); f=f.f_back
        if names & EXACT: prec=ir.INPUT_PRECISION.TF32x3
    return orig(self,a,b,d,prec,m)
I.InterpreterBuilder.create_dot=create_dot
ALL=[n for n in dir(F)+dir(B) if n.startswith("kda_")]
def run(label,exact):
    EXACT.clear(); EXACT.update(exact)
    got=harness.value_and_vjp(kda,impl,args,cot,harness.one_segment(impl,sizes))
    import jax
    e=[[f"{float(x):.1e}" for x in jax.tree.leaves(jax.tree.map(harness.error,g,w))] for g,w in zip(got,want)]
    print(label,e,flush=True)
for spec in sys.argv[1:]:
    run(spec, ALL if spec=="all" else spec.split(","))
