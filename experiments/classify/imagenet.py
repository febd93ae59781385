"""ImageNet as in torchvision: the names of its 1,000 classes, and the weight files.

Only downloading needs PyTorch and torchvision.
"""

from __future__ import annotations

import functools
import http.client
import importlib.resources
import re
import sys
from pathlib import Path
from typing import Literal

V1_RESIZE, V2_RESIZE = 256, 232  # the shorter side before the crop

# The files of IMAGENET1K_V2, as torchvision names them; ResNet-18 and 34 have none.
V2_FILES = ("resnet50-11ad3fa6", "resnet101-cd907fc2", "resnet152-f82ba261")


@functools.cache
def class_names() -> tuple[str, ...]:
    """The 1,000 classes by number, in torchvision's words."""
    text = (importlib.resources.files(__package__) / "imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def resize_for(path: Path) -> int:
    """The shorter side in pixels for a weight file: V2's if the file is named like torchvision's V2, otherwise V1's."""
    return V2_RESIZE if path.name.startswith(V2_FILES) else V1_RESIZE


def torchvision_weights(arch: str, version: Literal["V1", "V2"] | None) -> tuple[Path, int]:
    """torchvision's ImageNet weights in torch.hub's folder of checkpoints; downloads them if they are missing.

    Args:
      arch: a network's name.
      version: V1 or V2 [default: torchvision's default].

    Returns:
      the file, and the shorter side in pixels to which pictures are resized for it.

    Raises:
      ValueError: torchvision is not installed, has no such weights, or cannot download them.
    """
    try:
        import torch
        import torchvision
    except ImportError as error:
        raise ValueError(
            f'--weights torchvision needs torchvision, which is missing ({error}): pip install -e ".[torch]", or pass '
            "--weights FILE"
        ) from error
    known = torchvision.models.get_model_weights(arch)
    name = known.DEFAULT.name if version is None else f"IMAGENET1K_{version}"
    if name not in known.__members__:
        raise ValueError(f"torchvision has no {version} weights of {arch}: it has {', '.join(known.__members__)}")
    choice = known[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / choice.url.rpartition("/")[2]
    if not path.exists():
        print(f"downloading {choice.url} to {path}", file=sys.stderr)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(choice.url, str(path), re.search("-([0-9a-f]+)", path.stem)[1])
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: wrong checksum
            raise ValueError(
                f"{choice.url} cannot be downloaded ({error}): put the file at {path}, or pass --weights FILE"
            ) from error
    return path, choice.transforms().resize_size[0]
