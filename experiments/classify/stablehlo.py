"""Writes and reads networks as StableHLO files, which include weights and normalization and work without this package.

FILE.stablehlo is serialized by `jax.export`. It maps pictures (N, H, W, C) uint8, for any N, to logits
(N, num_classes), on a CPU, GPU or TPU. FILE.stablehlo.json says how pictures are decoded and names the classes.

    program = jax.export.deserialize(bytearray(Path("cars.stablehlo").read_bytes()))
    logits = program.call(images)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(
    path: Path, network: Callable[[jax.Array], jax.Array], shape: tuple[int, int, int], facts: Mapping[str, Any]
) -> None:
    """Writes FILE.stablehlo and FILE.stablehlo.json in a temporary folder, then moves each of them into place.

    Args:
      path: FILE.stablehlo.
      network: pictures (N, H, W, C) uint8 -> logits (N, num_classes); traced.
      shape: (H, W, C).
      facts: JSON values that a reader needs besides the network.

    Raises:
      ValueError: `path` has another suffix.
    """
    if path.suffix.lower() != SUFFIX:
        raise ValueError(f"StableHLO files end in {SUFFIX}, got {path}")
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape(", ".join(map(str, ("n", *shape)))), np.uint8)
    program = jax.export.export(jax.jit(network), platforms=PLATFORMS)(images).serialize()
    facts = {**facts, "sha256": hashlib.sha256(program).hexdigest()}
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        for target, data in ((_beside(path), json.dumps(facts, indent=1).encode()), (path, program)):
            aside = Path(folder) / target.name
            aside.write_bytes(data)
            os.replace(aside, target)


def read(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """Reads the files that `write` has written.

    Returns:
      the network as a function of pictures, compiled once for each N, and the facts.

    Raises:
      ValueError: a file is missing, damaged, or does not belong to the other.
    """
    beside = _beside(path)
    for file in (path, beside):
        if not file.is_file():
            raise ValueError(f"no file {file}: a StableHLO file and the .json beside it go together")
    data = path.read_bytes()
    try:
        facts = json.loads(beside.read_bytes())
        checksum = facts["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{beside} is not what --export wrote ({error!r}): export again") from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(f"{path} does not belong to {beside}: their checksums differ; copy or export both again")
    try:
        call = jax.jit(jax.export.deserialize(bytearray(data)).call)
    except Exception as error:  # flatbuffers raises almost any type for other files
        raise ValueError(f"{path} is no file that this version of JAX can read: export again ({error})") from error
    return lambda images: np.asarray(call(images)), facts


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
