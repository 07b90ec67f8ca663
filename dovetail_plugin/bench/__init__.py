"""Benchmarks of plain generation against generation with a draft: runs, results, plots, simulated acceptance."""
