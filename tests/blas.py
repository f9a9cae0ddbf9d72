"""NumPy's products on one thread, which must be asked for before NumPy is imported.

Several wait for each other in busy loops: beside another process on two cores, a product of
[64, 256] and [256, 64] took 8 ms of CPU time, and takes 0.06.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"
