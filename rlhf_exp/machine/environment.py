"""Sets environment variables of the process on import, which must come before torch's.
Variables that the user has set stay, except MPLBACKEND: figures are only drawn to files, and a
notebook may have set a backend whose package is missing, with which matplotlib fails to import.

Threads: OpenMP's threads spin while they wait, and with as many jobs as cores that makes a job
tens of times slower; without spinning, small models, which wait often, are up to twice as slow. So
they spin for a moment. Pages: where Linux lets the program choose, large tensors use large pages,
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
