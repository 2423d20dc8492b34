"""Records: the files of a run and of a sweep, each written and read by one module.

``run_files``, ``metrics_file`` and ``sweep_file`` define what is in each file. ``run_folder`` is a
run's folder as training writes it; ``results`` collects a whole sweep for a report. ``json_files``
reads what nobody vouches for; ``stores`` is the door to disks and object stores. Nothing here
imports JAX.
"""
