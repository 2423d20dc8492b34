"""The report: page, sections, tables and figures from the statistics of a sweep."""
