"""Where records lie: a disk or an object store, and who may write there."""
