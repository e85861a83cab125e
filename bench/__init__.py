"""Measurements side by side: `make bench` writes bench/RESULTS.md, `make results` weights/RESULTS.md."""
