"""Thin helpers for the notebooks: flat, one noun each. README.md says which module may import which."""
