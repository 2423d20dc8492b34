"""What is measured, against what a user would use instead: `python -m benchmarks.NAME --json=F`."""
