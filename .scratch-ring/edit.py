import sys,re
p='jla/triton/kernels/kda_backward.py'; s=open(p).read()
i=s.index("def kda_key_gradients("); a=s.index("# Neighbours:",i); b=s.index("# All others",a)
near=s[a:b]; lev=s[b:]
f=lambda t: t.replace("product_add(","dot_add(").replace("product(","dot(")
if "near" in sys.argv: near=f(near)
if "levels" in sys.argv: lev=f(lev)
s=s[:a]+near+lev
if "query" in sys.argv:
    i=s.index("def kda_query_gradients("); a=s.index("# Neighbours.",i); b=s.index("@triton.jit",a)
    s=s[:a]+f(s[a:b])+s[b:]
open(p,'w').write(s)
