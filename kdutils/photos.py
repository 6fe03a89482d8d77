"""Photographs of any kind and size as DUSt3R wants them; their intrinsics follow the resize and the crop."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kdutils import geometry

PATCH = 16  # pixels; every side becomes a multiple of it
SMALL_MODEL = 224  # the long edge that means the model trained on squares of this side


@dataclass(frozen=True)
class Photos:
    """Photographs ready for ``inference.DUSt3RTeacher``.

    Attributes:
        image: list of ``(H, W, 3)`` uint8 RGB; sizes may differ.
        intrinsics: list of ``(3, 3)`` in pixels of ``image``; ``None`` where not known.
        files: the images' files.
        skipped: other files to the reason why they could not be used.
    """

    image: list
    intrinsics: list
    files: list
    skipped: dict


def open_photos(files, long_edge=512, intrinsics=None):
    """Open photographs; a file that cannot be used is left out and listed in ``skipped``.

    Args:
        files: paths of images in any of Pillow's formats; EXIF rotations are applied.
        long_edge: of the result in pixels, 512 or 224 as the checkpoint was trained.
        intrinsics: ``(3, 3)`` for all or ``(N, 3, 3)``, in pixels of the files' upright images.
    """
    opened = Photos([], [], [], {})
    given = [None] * len(files) if intrinsics is None else np.broadcast_to(intrinsics, (len(files), 3, 3))
    for file, matrix in zip(map(Path, files), given, strict=True):
        try:
            with Image.open(file) as image:
                photo, scaled = resized_and_cropped(to_rgb(image), long_edge, matrix)
        except Exception as error:  # a damaged file fails in many ways
            opened.skipped[str(file)] = str(error).replace(str(file), "").strip() or type(error).__name__
        else:
            opened.image.append(photo)
            opened.intrinsics.append(scaled)
            opened.files.append(file)
    return opened


def to_rgb(image):
    """A Pillow image of any mode as upright 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, of which Pillow itself would cut off all above 255
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def resized_and_cropped(image, long_edge=512, intrinsics=None):
    """Resize and crop as DUSt3R was trained: long edge first, then the centre, in whole patches.

    Square images are cropped to 4:3. For the 224 model the *short* edge is resized and the centre square is kept.

    Args:
        image: upright RGB Pillow image.
        long_edge: in pixels.
        intrinsics: ``(3, 3)`` of the image, or ``None``.

    Returns:
        The image ``(H, W, 3)`` uint8 and its intrinsics ``(3, 3)``, or ``None``.

    Raises:
        ValueError: a side of the image, or of the result, is smaller than a patch.
    """
    size = image.height, image.width
    edge = min(size) if long_edge == SMALL_MODEL else max(size)
    resized = tuple(round(side * long_edge / edge) for side in size)
    cropped = tuple(side // PATCH * PATCH for side in resized)
    if long_edge == SMALL_MODEL:
        cropped = (SMALL_MODEL, SMALL_MODEL)
    elif resized[0] == resized[1]:
        cropped = (cropped[1] * 3 // 4 // PATCH * PATCH, cropped[1])
    if min(size) < PATCH or min(cropped) < PATCH:
        raise ValueError(f"image of {image.width}x{image.height} pixels is too small or too narrow")
    kind = Image.Resampling.LANCZOS if edge > long_edge else Image.Resampling.BICUBIC
    top, left = ((r - c) // 2 for r, c in zip(resized, cropped))
    pixels = np.asarray(image.resize(resized[::-1], kind))[top : top + cropped[0], left : left + cropped[1]].copy()
    return pixels, None if intrinsics is None else geometry.rescale(intrinsics, size, resized, (top, left))
