"""Environment variables of the process, set when this is imported, which must be before torch is.
What the user has set stays, but for MPLBACKEND: figures are drawn to files alone, and a backend
whose package is missing, as where a notebook has set it, fails the import of matplotlib.

Waiting threads: OpenMP's spin, and with as many jobs as cores that makes a job tens of times
slower; not to spin at all makes small models up to twice as slow, since they wait often. So they
spin for a moment. Pages: where Linux leaves it to the program, large tensors lie on large pages,
which are cleared faster.
"""

import os

for _name, _value in {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "2000",
    "THP_MEM_ALLOC_ENABLE": "1",
}.items():
    os.environ.setdefault(_name, _value)
os.environ["MPLBACKEND"] = "agg"
