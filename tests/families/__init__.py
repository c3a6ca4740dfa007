"""Small configurations of the networks that people use, by family: what tests and ``tools/coverage.py`` run."""
