"""Finds the ResNet among the arrays of a file, under any prefix and under the names of several libraries.

The search looks for the first kernel of the first block, `layer1.0.conv1.weight` in torchvision's names. The part of
the array's name before this is the prefix of the network, such as an entry of a checkpoint or an attribute of a module.
Other arrays are left out, such as an optimizer or a teacher, except for a dense layer beside the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_resnet.naming import KERAS, LAYERS, NAMINGS, Naming, from_keras, torchvision_names
from jax_resnet.weight_files import refuse_bombs

__all__ = ["Found", "find"]

_WRAPPERS = {  # name components that wrappers of modules add: DataParallel, torch.compile, FSDP, Opacus
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_module",
}  # fmt: skip
_TRAINED = ("state_dict", "model", "model_state_dict")  # checkpoints hold the trained network in one of these entries
_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow)([._]|$)", re.IGNORECASE)
# Arrays with such names may lie beside the layers without being part of the ResNet. One may be the dense layer.
_BESIDE = re.compile(
    "criterion|loss|queue|metric|acc|auc|n_averaged|optim|proj|predict|mlp|prototype|head|classif|linear|logit|fc|"
    "class_?weight|pos_weight|prior|center",
    re.IGNORECASE,
)
_HEAD = re.compile(r"(?!.*(proj|predictor|embed))(.*(fc|head|classif|linear|logit|output|predictions|dense).*|\d+)$")
_BLOCK = "layer1.0.conv1.weight"


class Found(NamedTuple):
    """A network in a file.

    arrays: {torchvision's name: array in torchvision's layout}; unexpected arrays keep the names of the file.
    prefix: the prefix of the names in the file, such as "state_dict.module.".
    naming: the library that the names in the file come from.
    left_out: the names of everything else in the file, arrays or not.
    head: the file's name of the dense layer; None if the file has none, or a head of several layers.
    notes: sentences for the user about arrays that were left out although the network depends on them.
    """

    arrays: dict[str, np.ndarray]
    prefix: str
    naming: Naming
    left_out: tuple[str, ...]
    head: str | None
    notes: tuple[str, ...] = ()


def find(arrays: Mapping[str, Any], others: Iterable[str], entry: str | None = None) -> Found:
    """Finds the network in a file. Of several networks it takes the trained one, not the moving average of its weights.

    Args:
      arrays: {name: array}, NumPy arrays or objects whose method `array()` makes one; only the network's are made.
      others: the names of entries that are not arrays.
      entry: a part of the prefix of the network to take, such as "teacher" or "state_dict_ema".

    Raises:
      ValueError: the file has no network, several, or none with this entry, or one of the network's arrays is sparse,
        quantized or another special tensor. The message continues a sentence that begins with the file's name.
    """
    originals = _without_wrappers(arrays)
    networks = {prefix: naming for prefix, naming in _networks(originals)}
    wrapped = {prefix: _with_wrappers(prefix, naming, originals) for prefix, naming in networks.items()}
    shown = {prefix: wrapped[prefix] or prefix for prefix in networks}
    chosen = _choose(shown, entry)
    if chosen is None:
        some = ", ".join([*arrays][:4]) or "none"
        raise ValueError(f"holds no ResNet: there is no {_BLOCK}, whatever the prefix; the first names are {some}")
    naming = networks[chosen]
    names = torchvision_names(naming)
    deeper = tuple(prefix for prefix in networks if prefix != chosen and prefix.startswith(chosen))
    inner = {}
    for name, original in originals.items():
        if name.startswith(chosen) and original.startswith(wrapped[chosen]) and not name.startswith(deeper):
            theirs = name.removeprefix(chosen)
            inner[names.get(theirs, theirs)] = original
    outer, parent = {}, chosen.removesuffix(".").rpartition(".")[0]
    parent = f"{parent}." if parent else ""
    if chosen:
        outer = {n.removeprefix(parent): o for n, o in originals.items() if n.startswith(parent)}
        outer = {name: original for name, original in outer.items() if original not in set(inner.values())}
    head, dense = _find_head(arrays, inner, outer)
    elsewhere = tuple(prefix for prefix in networks if not chosen.startswith(prefix))
    normalization = list(_normalizations(arrays, originals, chosen, elsewhere))
    known = {original for pair in normalization for original in pair}
    beside = {
        n: o
        for n, o in inner.items()
        if n.split(".")[0] not in LAYERS[:-1] and (o in known or not _unexpected(n, arrays[o]))
    }
    ours = {n: o for n, o in inner.items() if n not in beside and o not in dense.values()} | dense
    left_out = [name for name in arrays if name not in set(ours.values())]
    refuse_bombs(sum(math.prod(arrays[o].shape) * arrays[o].dtype.itemsize for o in ours.values()))
    taken = {name: _made(original, arrays[original]) for name, original in ours.items()}
    return Found(
        from_keras(taken) if naming is KERAS else taken,
        shown[chosen],
        naming,
        tuple(_summary([*left_out, *others], shown[chosen])),
        head,
        (
            *(
                f"{mean} and {std} were left out: normalize the pictures with them before the network"
                for mean, std in normalization
            ),
            *(
                f"{weight}, which may be the layer that names the classes, was left out"
                for weight in _other_heads(arrays, outer if dense and parent not in networks else {}, dense)
            ),
        ),
    )


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Returns {name without the components in _WRAPPERS: name}. Names that would become equal stay as they are."""
    bare: dict[str, list[str]] = {}
    for name in names:
        bare.setdefault(".".join(part for part in name.split(".") if part not in _WRAPPERS), []).append(name)
    return {short if len(full) == 1 else name: name for short, full in bare.items() for name in full}


def _networks(names: Iterable[str]) -> Iterator[tuple[str, Naming]]:
    """The prefix and the naming of each network."""
    for name in names:
        for naming in NAMINGS:
            block = naming.theirs(_BLOCK)
            if f".{name}".endswith(f".{block}"):
                yield name.removesuffix(block), naming


def _with_wrappers(prefix: str, naming: Naming, originals: Mapping[str, str]) -> str:
    """The prefix as the file has it, with wrappers; "" if wrappers also lie inside the names of the layers."""
    block = naming.theirs(_BLOCK)
    original = originals[prefix + block]
    return original.removesuffix(block) if original.endswith(block) else ""


def _choose(shown: Mapping[str, str], entry: str | None) -> str | None:
    """Chooses a network from {prefix: prefix as the file has it} and returns its prefix; None if there are none."""
    prefixes = list(shown)
    there = ", ".join(shown[prefix].removesuffix(".") or "the file itself ('')" for prefix in prefixes)
    if entry is not None:
        of_entry = [p for p in prefixes if any(f".{entry}." in f".{name}" for name in (p, shown[p]))]
        whole = f"{entry}." if entry else ""
        prefixes = [p for p in prefixes if whole in (p, shown[p])] or of_entry  # not a network inside this one
        if not prefixes:
            raise ValueError(f"has no network in {entry!r}, {'only in ' + there if there else 'nor elsewhere'}")
    for keep in (lambda p: shown[p].split(".")[0] in _TRAINED, lambda p: not _AVERAGE.search(p)):
        if len(prefixes) > 1:
            prefixes = [prefix for prefix in prefixes if keep(prefix)] or prefixes
    if len(prefixes) > 1:
        raise ValueError(f"has several networks: in {there}. Name one: --entry NAME, or entry= in Python")
    return prefixes[0] if prefixes else None


def _find_head(arrays: Mapping[str, Any], *scopes: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
    """Returns the file's name of the dense layer, and {"fc.weight": name in the file, "fc.bias": name in the file}.

    The dense layer is called fc, or is the only layer of a module named like a head and has 512 or 2048 inputs.
    """
    for scope in scopes:
        modules: dict[str, list[str]] = {}
        for name in scope:
            first = name.split(".")[0]
            if first == "fc" or first not in LAYERS:
                modules.setdefault(first, []).append(name)
        layers = {}
        for names in modules.values():
            layer = names[0].rpartition(".")[0]
            dense = [arrays[scope[name]].shape for name in names if len(arrays[scope[name]].shape) == 2]
            alone = len(dense) == 1 and {name.rpartition(".")[0] for name in names} == {layer}
            fits = alone and {512, 2048} & {*dense[0]} and all(map(_HEAD.match, layer.split(".")))
            if fits or layer == "fc":
                layers[layer] = names
        layers = {"fc": layers["fc"]} if "fc" in layers else layers
        if len(layers) == 1:
            ((layer, names),) = layers.items()
            fields = {name: name.rpartition(".")[2].replace("kernel", "weight") for name in names}  # Keras' kernel
            return layer, {f"fc.{field}": scope[name] for name, field in fields.items()}
    return None, {}


def _other_heads(arrays: Mapping[str, Any], outer: Mapping[str, str], dense: Mapping[str, str]) -> Iterator[str]:
    """The names in the file of dense layers beside the network that are named like a head, except its own.

    Args:
      outer: {name: name in the file} of what lies beside the network.
      dense: the network's own, {name: name in the file}.
    """
    for name, original in outer.items():
        layer, _, field = name.rpartition(".")
        if field in ("weight", "kernel") and len(arrays[original].shape) == 2 and original not in dense.values():
            if layer.split(".")[0] not in LAYERS[:-1] and all(map(_HEAD.match, layer.split("."))):
                yield original


def _normalizations(
    arrays: Mapping[str, Any], originals: Mapping[str, str], prefix: str, elsewhere: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """The names of the mean and the deviation with which the model in the file normalizes pictures before the network.

    They are in a module beside the network or beside a module that holds the network, such as normalize.mean and
    normalize.std. Each has one number, or one per channel.
    """
    for name, mean in originals.items():
        std = originals.get(re.sub(r"mean$", "std", name), mean)
        pair = [arrays[mean], arrays[std]]
        if (
            std != mean
            and prefix.startswith("".join(f"{part}." for part in name.split(".")[:-2]))
            and not name.startswith(elsewhere)
            and all(jnp.issubdtype(array.dtype, jnp.floating) for array in pair)
            and all(array.shape and math.prod(array.shape) in (1, 3) for array in pair)
        ):
            yield mean, std


def _unexpected(name: str, array: Any) -> bool:
    """Whether an array beside the layers may be a part of the network. A count or an array of a loss is not."""
    return bool(array.shape) and jnp.issubdtype(array.dtype, jnp.floating) and not _BESIDE.search(name.split(".")[0])


def _made(name: str, array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    try:
        return array.array()
    except (TypeError, ValueError) as error:
        raise ValueError(f"has tensors that are not plain arrays: {name} is {error}") from error


def _summary(names: Iterable[str], prefix: str) -> Iterator[str]:
    """Groups names by the first component that differs from the prefix, and describes each group.

    A group of one entry gets the full name of the entry. If the name of a group is a number, its first members follow.
    """
    groups: dict[str, list[str]] = {}
    path = prefix.split(".")
    for name in names:
        parts = name.split(".")
        common = next((i for i, (a, b) in enumerate(zip(parts, path, strict=False)) if a != b), 0)
        groups.setdefault(".".join(parts[: common + 1]), []).append(name)
    for group, members in groups.items():
        inside = [name.removeprefix(f"{group}.") for name in members]
        if len(members) == 1 and members[0].count(".") == group.count(".") + 1:
            yield members[0]
        elif group.split(".")[-1].isdecimal() and inside != [group]:
            yield f"{group!r} ({', '.join(inside[:3])}{', …' if len(inside) > 3 else ''})"
        else:
            yield group
