"""The benchmarks that the paper reports, on any bundle and backend: `python -m runtime.evaluate`. docs/evaluation.md
tells the way from download to table."""
