"""Sweeps, metrics, reports, comparisons."""
