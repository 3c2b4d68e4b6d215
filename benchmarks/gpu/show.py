"""What became of each task, as a table."""

from rich.console import Console

from ..tables import table


def show(became: dict[str, str], console: Console) -> None:
    """became: a sentence by task; empty where it is done."""
    shown = table("One GPU", "task", ["result"])
    for name, why in became.items():
        shown.add_row(name, why or "done")
    console.print(shown)
