"""Settings of the property-based tests: the same examples every time, and no verdict by a clock."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, settings

#: Worker pools live for the whole session, so a fixture is no state of one example.
_SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(count: int, shrink: bool = True) -> Any:
    """Settings for ``count`` examples; what fails is shrunk, unless each try takes long."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=_SHARED,
        phases=(Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])), report_multiple_bugs=False,
    )  # fmt: skip
