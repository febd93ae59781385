"""Converts ResNet weights between PyTorch, safetensors, NumPy and Keras files; also reads the hub and runs.

    python -m experiments.convert checkpoint.pth weights.safetensors
    python -m experiments.convert runs/cars/checkpoints/500 best.safetensors
    python -m experiments.convert hf:timm/resnet50.a1_in1k resnet50.npz
    python -m experiments.convert resnet50.pth model.safetensors --names huggingface

The new file has torchvision's names and layout, so that torchvision and timm load it directly, or those of Hugging Face
or Keras. Values and their types stay the same, bit for bit.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from experiments.cli import Arch, check_output_file, exit_code, parse
from experiments.training.run_folder import run_metadata

if TYPE_CHECKING:
    from jax_resnet import resnet, weights

Names = Literal["torchvision", "huggingface", "keras"]  # copied from jax_resnet.weights, whose import takes a second


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    arch: Arch | None = None,
    entry: str | None = None,
    names: Names | None = None,
    overwrite: bool = False,
) -> None:
    """Convert the weights of a ResNet from one file to another.

    Args:
      source: a weight file of any kind, or a training checkpoint that contains weights; a folder of Hugging Face or of
        a run, or a checkpoint of a run; or hf:OWNER/NAME for Hugging Face's hub.
      target: the file to write: .safetensors, .npz, .pth or .pt; .h5 for Keras.
      arch: the network; by default it is recognized.
      entry: which network to take from a file with several, such as model_ema or teacher; by default the trained one.
      names: the names in the new file: torchvision's (also timm's), Hugging Face's (ResNetForImageClassification of
        transformers) or Keras' (keras.applications); by default the suffix decides.
      overwrite: replace an existing file.
    """
    from jax_resnet import resnet, weights
    from jax_resnet.naming import COUNT
    from jax_resnet.weight_checks import check_arrays

    names = weights.check_suffix(target, names)
    check_output_file("target", target)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already: choose another name, or pass --overwrite")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{target} cannot be written: {target.parent} is read-only")
    file = weights.read_file(source, entry)
    arch, config = weights.recognize_file(file, arch)
    check_arrays(file.arrays, config, file.path)
    metadata = dict(run_metadata(file))
    if file.stride_in:
        metadata["stride_in"] = file.stride_in
    if file.batch_norm_eps is not None:
        metadata["batch_norm_eps"] = repr(file.batch_norm_eps)
    arrays, left_out = file.arrays, list(file.left_out)
    if names == "keras":
        if config.batch_norm_eps != resnet.ResNetConfig.batch_norm_eps:
            raise ValueError(f"{source} was saved with batch_norm_eps={config.batch_norm_eps}: Keras has another")
        arrays = {name: array for name, array in arrays.items() if name.rpartition(".")[2] != COUNT}
        left_out += ["batch counts"] * (len(arrays) < len(file.arrays))
    if target.suffix.lower() != ".safetensors":
        left_out += [f"metadata {name}" for name in sorted(metadata)]
        metadata = {}
    told = [f"{source}, {megabytes(file.path)}: {describe(arch, config, file.arrays)}", *findings(file)]
    if left_out:
        told.append(f"  left out: {', '.join(left_out[:20])}{' …' if len(left_out) > 20 else ''}")
    # What config says beyond the arrays is in the metadata; only Keras' names need it. This may replace the source.
    added = write_checked(target, arrays, metadata, names, config if names == "keras" else None)
    if added:
        told.append(f"  {len(added)} batch counts of 0 added, since torch expects them")
    print("\n".join(told))
    but = ", except that variances are rounded, since Keras has another eps" if names == "keras" else ""
    print(f"{target}, {megabytes(target)}: read back, the same bit for bit{but}")


def findings(file: weights.WeightFile) -> list[str]:
    """A line for each fact about how the source stores the network: place, names, dense layer, stride."""
    told = [f"  {note}" for note in file.notes]
    if file.prefix:
        told.append(f"  found in {file.prefix.removesuffix('.')!r}")
    if file.naming != "torchvision":
        told.append(f"  {file.naming}'s names: converted to torchvision's")
    if file.head not in (None, "fc"):
        told.append(f"  the source calls the dense layer {file.head!r}")
    if "fc.weight" not in file.arrays:
        told.append("  it has no dense layer, or one that is not a single layer: the file holds the backbone alone")
    if file.stride_in == "conv1":
        told.append('  its blocks have their stride in the first convolution: pass stride_in="conv1" when you load it')
    if file.batch_norm_eps is not None:
        told.append(f"  BatchNorm's eps is {file.batch_norm_eps}: pass it as batch_norm_eps when you load it")
    return told


def describe(arch: str, config: resnet.ResNetConfig, arrays: Mapping[str, np.ndarray]) -> str:
    """Describes the network and its weights in one line."""
    from jax import tree

    from jax_resnet import weights

    params, batch_stats = map(tree.leaves, weights.from_torch(arrays))
    dtypes = sorted({str(array.dtype) for array in params + batch_stats})
    return (
        f"{arch}, {config.num_classes or 'no'} classes, {config.in_channels} channels"
        f"{'' if config.batch_norm else ', no BatchNorm'}; {sum(array.size for array in params):,} parameters, "
        f"{len(params) + len(batch_stats)} arrays of {' and '.join(dtypes)}"
    )


def megabytes(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"


def write_checked(
    target: Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    names: Names,
    config: resnet.ResNetConfig | None,
) -> list[str]:
    """Writes a temporary weight file, reads it back, compares it bit for bit, and only then renames it to `target`.

    Returns:
      the names of the batch counts that were added for torch.

    Raises:
      ValueError: an array differs.
    """
    from jax_resnet import naming, weights

    weights.check_writable(target, arrays, names, config, metadata)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        aside = Path(folder) / target.name
        weights.write_arrays(aside, arrays, names=names, config=config, metadata=metadata)
        back = weights.read_arrays(aside)
        added = [name for name in back if name not in arrays]
        wrong = [name for name in added if name.rpartition(".")[2] != naming.COUNT]
        for name, array in arrays.items():
            same = same_up_to_eps if names == "keras" and name.endswith("running_var") else same_bits
            if name not in back or not same(array, back[name]):
                wrong.append(name)
        if wrong:
            raise ValueError(f"{target} was not written: read back, {len(wrong)} arrays differ: {', '.join(wrong)}")
        os.replace(aside, target)
    return added


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def same_up_to_eps(a: np.ndarray, b: np.ndarray) -> bool:
    """Compares variances: adding and subtracting the difference of two eps has rounded their last digit."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return bool((abs(a - b) <= np.spacing(abs(a) + a.dtype.type(1e-7))).all())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: parse(convert, arguments, "convert"))


if __name__ == "__main__":
    sys.exit(main())
