"""Figures of the results, one file per subject; matplotlib is imported only here, and only for a requested figure."""
