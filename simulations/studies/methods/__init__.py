"""Which method when: aggregation methods over clients, skew, rank and local steps.

    parts      what is run: experiments, methods and grid points, in parts of some minutes
    claims     what papers agree on, as contrasts between the runs of a part
    evidence   a comparison reduced to what the page needs, and the intervals of contrasts
    figures    the plots
    page       RESULTS.md; what is written there by hand is kept
    wearers    the data set "watch" for cheap runs; `conflict`: people who contradict one another
    authors    whose messages are these? another data set, with its base

Run by `python -m simulations.studies.methods`; see there.
"""

import os

# Before NumPy is there: SVDs of a few rows take several times as long with threads that wait.
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
