"""The benchmarks: step times, collectives, compression kernels, losses, and a report of them."""

import sys
from importlib.util import find_spec

_MISSING = [name for name in ("jinja2", "matplotlib", "numpy", "pandas", "rich", "torch") if find_spec(name) is None]
if _MISSING:
    _why = f"The benchmarks need {', '.join(_MISSING)}: pip install dear-torch[bench]"
    # Started by `python -m` the sentence says it all; an import shows where it was.
    raise SystemExit(_why) if sys.argv[0] == "-m" else ImportError(_why)
