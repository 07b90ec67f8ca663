"""Comparisons of plain and drafted generation: running, adding up, plotting, and synthetic acceptance."""
