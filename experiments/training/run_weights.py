"""What a weight file of a run tells of its network, its classes and its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping

from jax_resnet.weights import WeightFile

# In the metadata of the file, as JSON; of a run that has not ended, in its config.json.
RUN_FACTS = ("arch", "class_names", "image_size", "grey", "mean", "std")


def run_metadata(file: WeightFile) -> Mapping[str, str]:
    """The metadata of a weight file; of a checkpoint of a run those that its weight file will have."""
    facts = file.settings.get("input")
    if file.metadata or not isinstance(facts, Mapping):
        return file.metadata
    return {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}


def is_of_a_run(metadata: Mapping[str, str]) -> bool:
    """Whether metadata are those of a run of this project: other programs write one of these names, or two."""
    return 2 * sum(name in metadata for name in RUN_FACTS) > len(RUN_FACTS)
