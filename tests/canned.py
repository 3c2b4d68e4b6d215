"""Results of the training benchmark as its writer makes them, with round numbers."""

from typing import Any


def strategy(name: str, rounds: list[list[float]], **more: Any) -> dict[str, Any]:
    """Two ranks, the second always 1 ms slower."""
    blocks = [
        {
            "round": number,
            "ms": [times, [ms + 1 for ms in times]],
            "cpu_ms_per_step": [50.0, 70.0],
            "sent_bytes_per_step": [2**20, 2**20],
            "engine": [{}, {}],
        }
        for number, times in enumerate(rounds)
    ]
    plain = {"failure": None, "payload_bytes_per_step": 12_500_000, "held_out_loss": 3.0}
    series = {"losses": [5.0, 4.0, 3.0], "clock_ms": [100.0, 100.0, 100.0]}
    return {"name": name, "blocks": blocks, "optimizer_state_bytes": [8, 10], **plain, **series, **more}


def training_cell() -> dict[str, Any]:
    """Six strategies, one of them failed, in two rounds."""
    return {
        "rate": "500mbit",
        "network": "emulated network",
        "workers": 2,
        "plan": {"optimizer": "sgd", "rounds": 2, "steps": 2},
        "strategies": [
            strategy("none", [[99.0, 99.0], [199.0, 199.0]], payload_bytes_per_step=0),
            strategy("ddp:1", [[249.0, 249.0], [449.0, 449.0]]),
            strategy("ddp:25", [[299.0, 299.0], [499.0, 499.0]]),
            strategy("ddp+fp16", [[149.0, 149.0], [249.0, 249.0]], payload_bytes_per_step=6_250_000),
            strategy("dear:sharded", [[199.0, 199.0], [399.0, 399.0]]),
            strategy("fsdp2", [], failure="rank 1: RuntimeError: no luck"),
        ],
    }
