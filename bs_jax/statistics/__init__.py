"""Statistics: seed noise, contrasts, curves and verdicts from the results of a sweep."""
