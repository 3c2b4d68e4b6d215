"""JSON and YAML as a person may have written them: a key that stands twice is refused; both would take the last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def parsed(text: str, is_json: bool) -> Any:
    """The value that the text stands for.

    Raises:
        ValueError: it cannot be read, or a mapping has a key twice.
    """
    if is_json:
        return json.loads(text, object_pairs_hook=_once)
    import yaml

    class Loader(yaml.SafeLoader):
        """As YAML's own, which takes the last of two."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            # What "<<" brings in may stand again: it is there to be changed.
            _once((key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            return node

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands twice in one mapping: leave one of them out")
        found[key] = value
    return found
