"""One file for each command of python -m dear: options() declares what it takes, run() does it."""
