"""Small programs to copy: each does one thing, and `tests/docs` runs them as they are."""
