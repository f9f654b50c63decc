"""Analysis of runs: mask stability, and figures of a run."""
