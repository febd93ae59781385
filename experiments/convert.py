"""Moves ResNet weights between .safetensors, .npz, .pth and .pt files.

    python -m experiments.convert checkpoint.pth weights.safetensors

What is written holds torchvision's names and layout, so that torchvision and timm load it as it is; the numbers are the
same, bit for bit, and of the same type.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import tyro

from experiments.cli import Arch
from jax_resnet import resnet, weights

COUNT = "num_batches_tracked"  # torch's, of each BatchNorm: no part of the network


def recognize(arrays: Mapping[str, np.ndarray], arch: Arch | None = None) -> tuple[str, resnet.ResNetConfig]:
    """Tells from names and shapes what network weights are for; whether everything fits is for `check_arrays`.

    Where a bottleneck has its stride (stride_in) cannot be told from weights: it is torchvision's in what is returned.

    Args:
      arrays: {torchvision's name: array in torchvision's layout}.
      arch: the architecture if it is known: then it is not looked for.

    Returns:
      its name and its configuration.

    Raises:
      ValueError: if there is no first convolution or dense layer, or there are blocks as none of the five has them.
    """
    ends = {}
    for name, ndim in (("conv1.weight", 4), ("fc.weight", 2)):
        if name not in arrays or arrays[name].ndim != ndim:
            found = f"of shape {arrays[name].shape}" if name in arrays else "missing"
            some = ", ".join([*arrays][:4])
            raise ValueError(f"no ResNet: {name}, which must have {ndim} axes, is {found}; the first names are {some}")
        ends[name] = arrays[name].shape
    settings = dict(
        num_classes=ends["fc.weight"][0], in_channels=ends["conv1.weight"][1], batch_norm="bn1.weight" in arrays
    )
    networks = {name: getattr(resnet, name)(**settings) for name in get_args(Arch)}
    if arch is not None:
        return arch, networks[arch]
    blocks = {match.groups() for name in arrays if (match := re.match(r"layer([1-4])\.(\d+)\.", name))}
    stage_sizes = tuple(sum(stage == number for stage, _ in blocks) for number in "1234")
    block = "bottleneck" if "layer1.0.conv3.weight" in arrays else "basic"
    for name, config in networks.items():
        if (config.block, config.stage_sizes) == (block, stage_sizes):
            return name, config
    raise ValueError(
        f"{block} blocks, {stage_sizes} in the four stages, are none of {', '.join(networks)}: "
        "pass --arch to see what is missing or unexpected"
    )


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    arch: Arch | None = None,
    entry: str | None = None,
    overwrite: bool = False,
) -> None:
    """Move the weights of a ResNet from one file to another: .safetensors, .npz, .pth, .pt, and from .ckpt, .pth.tar.

    Args:
      source: the file to read: a state_dict, or a training checkpoint with one in it.
      target: the file to write.
      arch: the network, where it is not to be recognized.
      entry: the entry of a checkpoint to take, say model_ema; what is trained is taken if not given.
      overwrite: replace a file that is there.

    Raises:
      FileNotFoundError: if there is no such file, or no folder for the new one.
      ValueError: for files that cannot be read or written, or weights that do not fit the network.
    """
    if target.suffix not in weights.SUFFIXES:
        raise ValueError(f"weight files end in {', '.join(weights.SUFFIXES)}, got {target}")
    if target.is_dir():
        raise ValueError(f"{target} is a folder: name the file to write")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already: choose another name, or pass --overwrite")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} for {target.name}")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{target} cannot be written: {target.parent} is read-only")
    file = weights.read_file(source, entry)
    try:
        arch, config = recognize(file.arrays, arch)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    weights.check_arrays(file.arrays, config, source)
    metadata = weights.read_metadata(source) if source.suffix == ".safetensors" else {}
    left_out = list(file.left_out)
    if target.suffix != ".safetensors":
        left_out += [f"metadata {name}" for name in sorted(metadata)]
        metadata = {}
    description = f"{source}, {megabytes(source)}: {describe(arch, config, file.arrays)}"  # it may be replaced
    added = write_checked(target, file.arrays, metadata)
    print(description)
    if file.entry is not None:
        print(f"  taken from its entry {file.entry!r}")
    if file.prefix:
        print(f"  {file.prefix!r} stripped from every name")
    if left_out:
        print(f"  left out: {', '.join(left_out)}")
    if added:
        print(f"  {len(added)} batch counts added, as torch has them, all 0")
    print(f"{target}, {megabytes(target)}: read back, the same bit for bit")


def describe(arch: str, config: resnet.ResNetConfig, arrays: Mapping[str, np.ndarray]) -> str:
    """The network and its weights in a line."""
    params, batch_stats = (jax.tree.leaves(tree) for tree in weights.from_torch(arrays))
    dtypes = sorted({str(array.dtype) for array in params + batch_stats})
    return (
        f"{arch}, {config.num_classes} classes, {config.in_channels} channels"
        f"{'' if config.batch_norm else ', no BatchNorm'}; {sum(array.size for array in params):,} parameters, "
        f"{len(params) + len(batch_stats)} arrays of {' and '.join(dtypes)}"
    )


def megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"


def write_checked(target: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> list[str]:
    """Writes a weight file aside, reads it back, compares it bit for bit, and only then puts it in its place.

    Returns:
      the names of the batch counts that were added for torch.

    Raises:
      ValueError: if what was read is not what was written, or the format cannot hold it.
    """
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        aside = Path(folder) / target.name
        weights.write_arrays(aside, arrays, metadata=metadata)
        back = weights.read_arrays(aside)
        added = [name for name in back if name not in arrays]
        wrong = [name for name in added if name.rpartition(".")[2] != COUNT]
        wrong += [name for name, array in arrays.items() if name not in back or not same_bits(array, back[name])]
        if wrong:
            raise ValueError(f"{target} was not written: read back, {len(wrong)} arrays differ: {', '.join(wrong)}")
        os.replace(aside, target)
    return added


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        tyro.cli(convert, args=arguments, prog="python -m experiments.convert")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
