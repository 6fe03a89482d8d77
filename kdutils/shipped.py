"""The small weights that come with the study, in ``data/weights``: each in a folder with a card that says what it is.

A card names what the weights were trained on, for how long and on what machine, their validation figures, licence, and
the SHA-256 of the file, which is checked before the weights are used.
"""

import hashlib
from pathlib import Path

from safetensors.torch import load_file, save_file

from kdutils import artefacts
from kdutils.settings import REPOSITORY

WEIGHTS = REPOSITORY / "data" / "weights"
TEACHER = "compact_dust3r"
FILE, CARD, CONFIG = "model.safetensors", "card.json", "config.json"
LICENCE = "MIT, as the code; trained on rendered rooms of this repository alone"


class ShippedError(ValueError):
    """Weights that should be here are missing or damaged; the message names file, cause and remedy."""


def write(folder, model, card, config=None):
    """Write a model's weights in half precision, and last the card that vouches for them."""
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().half() if tensor.is_floating_point() else tensor.cpu()
               for name, tensor in model.state_dict().items()}  # fmt: skip
    artefacts.discard(folder / CARD)
    artefacts.write_aside(folder / FILE, lambda aside: save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, aside))  # fmt: skip
    if config:
        artefacts.write_json(folder / CONFIG, config)
    artefacts.write_json(folder / CARD, {
        "name": folder.name, "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": (folder / FILE).stat().st_size, "sha256": sha256(folder / FILE), "licence": LICENCE, **card,
    })  # fmt: skip


def card(name):
    """The card of shipped weights, a dict.

    Raises:
        ShippedError: there is none.
    """
    try:
        return artefacts.read_json(WEIGHTS / name / CARD)
    except artefacts.ArtefactError as error:
        raise ShippedError(f"{error}. It comes with the repository: git checkout -- data/weights") from error


def locate(name):
    """The file of shipped weights, once its digest is that of its card.

    Raises:
        ShippedError: file or card is missing, or the file is not the one that the card describes.
    """
    path, stated = WEIGHTS / name / FILE, card(name)["sha256"]
    if not path.exists():
        raise ShippedError(f"{path}: missing. It comes with the repository: git checkout -- data/weights")
    found = sha256(path)
    if found != stated:
        raise ShippedError(f"{path}: damaged, its SHA-256 is {found[:16]}... and not the card's {stated[:16]}... "
                           "Get it back with: git checkout -- data/weights")  # fmt: skip
    return path


def sha256(path):
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors(name):
    """Shipped weights by name, in single precision; see ``locate`` for errors."""
    kept = load_file(locate(name))
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in kept.items()}
