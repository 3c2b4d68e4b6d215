"""Prints the tables of claims beside what is predicted: python -m planner.claims"""

from __future__ import annotations

from . import consumers, papers

TABLES = {
    "throughputs": papers.throughputs,
    "dear": papers.dear_gains,
    "acp": papers.acp_gains,
    "consumers": consumers.speeds,
    "failing": consumers.failing,
}


def main() -> None:
    print("PREDICTED, not measured\n")
    print("\n\n".join(make() for make in TABLES.values()))


if __name__ == "__main__":
    main()
