"""A random state machine over the public API: the same program under plain DDP and under this library, compared.

A program is a list of small pieces of Python, drawn from a seed. Both workers run it once with plain DDP and once with
the library; what it notes (losses, values read, the final state) must be equal bit for bit, or the library must end it
with one clear error. ``python -m tests.machine --sequences 5000 --seed 1`` runs programs and prints each failure as a
small script. See generate.py for what is drawn, running.py for the names a program uses, play.py for how it is run and
compared, search.py for how a failing program becomes short.
"""
