"""Records: the files of a run and a sweep, written by training and read by the report."""
