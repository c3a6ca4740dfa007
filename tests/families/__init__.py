"""Families of networks that people use, in small configurations, for tests and ``tools/coverage.py``."""
