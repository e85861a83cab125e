"""Measurements side by side: `make bench` writes bench/RESULTS.md, bench.ablate recipes/ABLATIONS.md."""
