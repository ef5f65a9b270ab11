"""What privacy costs, and what personal training gives back of it.

    plan    tasks, methods, budgets, grids, and in which order the runs come
    runs    one run: calibrate, federate, evaluate each person once
    study   the plan carried out, resumable, a line a run
    page    RESULTS.md, made of those lines; what is written there by hand is kept

Run by `python -m simulations.studies.privacy`; see there.
"""

import os

# Before NumPy is there: products of a few rows take several times as long with threads that wait.
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
