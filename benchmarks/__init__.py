"""Side-by-side measurements; see docs/results.md."""
