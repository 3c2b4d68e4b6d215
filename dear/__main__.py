"""python -m dear: the planner's commands, which are a package of their own beside this one."""

import importlib.util
import runpy
import sys

# Installed, the planner is called dear_planner; in a checkout, planner.
NAMES = ("dear_planner", "planner")


def main() -> None:
    name = next((name for name in NAMES if importlib.util.find_spec(name) is not None), None)
    if name is None:
        raise SystemExit("error: The planner is not installed beside dear: install dear-torch, or run in a checkout.")
    sys.argv[0] = "dear"
    runpy.run_module(name, run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
