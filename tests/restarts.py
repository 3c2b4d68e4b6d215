"""How often a job comes back whose worker is killed: python tests/restarts.py --tries 20 --json FILE

Each try is a job of two workers under ``torchrun --max-restarts=2``, of which one is killed by SIGKILL in mid-training.
It has come back when it resumes from the last checkpoint and ends with the parameters of an uninterrupted job.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from frameworks import ROOT, torchrun

PATIENCE = 250  # seconds for a job
SAVE_EVERY = 5  # steps of examples/resume.py
PHASES = ("forward", "backward", "save")
Parameters = dict[str, torch.Tensor]


def run(
    folder: Path, kills: str, how: tuple[str, ...] = ("--standalone",), restarts: int | None = None
) -> tuple[str, Parameters]:
    """The output of a job, and the parameters that it ended with.

    kills: as tests/restarting.py takes them.
    restarts: how many torchrun may make. None: as many as kills, since a worker that calls a dead one costs one more,
        and sometimes comes back then.
    """
    checkpoint = folder / "checkpoint.pt"
    arguments = (str(checkpoint), str(folder / "killed"), kills)
    count = len(list(filter(None, kills.split(","))))
    how = (*how, f"--max-restarts={count if restarts is None else restarts}")
    output = torchrun(ROOT / "tests" / "restarting.py", *arguments, how=how, patience=PATIENCE)
    assert len(list(folder.glob("killed.*"))) == count, output
    return output, torch.load(checkpoint, weights_only=False)["model"]


def equal(have: Parameters, want: Parameters) -> bool:
    """Bit for bit."""
    return have.keys() == want.keys() and all(torch.equal(have[name], value) for name, value in want.items())


def kill(draw: random.Random) -> tuple[int, int, str]:
    """A rank, a step and a phase of it: in mid-training, after a checkpoint and before the last step."""
    phase = draw.choice(PHASES)
    step = SAVE_EVERY * draw.randint(2, 7) - 1 if phase == "save" else draw.randint(SAVE_EVERY, 38)
    return draw.randrange(2), step, phase


def attempt(draw: random.Random, want: Parameters) -> dict[str, Any]:
    """One job with one kill, and what became of it."""
    rank, step, phase = kill(draw)
    about = {"rank": rank, "step": step, "phase": phase}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            output, final = run(Path(folder), f"{rank}:{step}:{phase}", restarts=2)
        except Exception as error:  # what a job may end with is not known
            return about | {"came_back": False, "error": str(error)[-2000:]}
    found = re.search(r"started at step (\d+)", output)
    resumed = found is not None and int(found[1]) == step // SAVE_EVERY * SAVE_EVERY
    seconds = round(time.monotonic() - start, 1)
    return about | {"came_back": True, "resumed": resumed, "bit_equal": equal(final, want), "seconds": seconds}


def main() -> int:
    """Prints the figures; the exit status says whether every try came back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="a file for the figures and every try")
    options = parser.parse_args()
    draw, tries = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        _, want = run(Path(folder), "")
    for number in range(options.tries):
        tries.append(attempt(draw, want))
        print(f"{number + 1}/{options.tries}: {tries[-1]}", flush=True)
    counts = {key: sum(bool(each.get(key)) for each in tries) for key in ("came_back", "resumed", "bit_equal")}
    print(f"of {len(tries)} tries: {counts}")
    if options.json is not None:
        from benchmarks import records

        settings = {"tries": options.tries, "seed": options.seed, "workers": 2, "max_restarts": 2, "signal": "SIGKILL"}
        command = f"python tests/restarts.py {' '.join(sys.argv[1:])}"
        header = records.header("restarts", settings) | {"command": command}
        records.write(options.json, {**header, "tries": len(tries), **counts, "runs": tries})
    return int(min(counts.values()) < len(tries))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
