"""The host's time per call: the loop and the scheduler, with an engine that does nothing."""
import sys, time
sys.path.insert(0, "examples")
import numpy as np, serve, workload
from scheduler import Scheduler
class E:
    def prefill(self, pieces): return np.ones(4, np.int32)
    def decode(self, counts):
        a = np.zeros(128, np.int32)
        for s, c in counts.items(): a[s] = c
        return np.ones((1, 128), np.int32)
rs = workload.synthetic(512, rate=None, lengths=(100, 4000), vocabulary=256, settings=dict(new_tokens=256, temperature=1.0, top_k=None, top_p=None, stop=(), seed=0))
s = Scheduler(128, 4, 512)
c = time.process_time()
became, sec, calls = serve.serve(E(), s, rs)
c = time.process_time() - c
print(calls, c, "ms a decode call", 1e3 * c / calls["decode"])
