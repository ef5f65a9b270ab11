"""Studies: questions that a run of experiments answers, each with its results beside it."""
