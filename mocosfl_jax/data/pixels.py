"""From any image to a square of 8-bit RGB."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

_MAX_ASPECT = 50
_TOO_DEEP = "an image of 8 or 16 bits a channel is needed"


def square_rgb(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Turns an image upright, to 8-bit RGB, its short side to `size`, and crops its centre.

    As torchvision's `Resize(size, BICUBIC)` and `CenterCrop(size)`, antialiased. Transparency is
    dropped, of 16 bits the upper 8 are kept, and the EXIF orientation is applied. Where the long
    side exceeds 50 short ones, only the central part of that length is resized: memory is bounded.

    Args:
        image: any Pillow image.
        size: S, pixels.

    Returns: uint8 (S, S, 3).

    Raises:
        ValueError: pixels deeper than 16 bits.
    """
    image = _rgb(ImageOps.exif_transpose(image))
    if image.size != (size, size):
        image = _central_part(image)
        short = min(image.size)
        width, height = (size * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def square_arrays(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """`square_rgb` of a stack of images of one size.

    Args:
        images: uint8 (n, h, w), (n, h, w, 1) or (n, h, w, 3).
        size: S, pixels.

    Returns: uint8 (n, S, S, 3), writable and contiguous.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[1:3] == (size, size):
        return np.array(np.broadcast_to(images, (*images.shape[:3], 3)))
    out = np.empty((len(images), size, size, 3), np.uint8)
    for target, image in zip(out, images, strict=True):
        target[...] = square_rgb(
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), size
        )
    return out


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError(_TOO_DEEP)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError(_TOO_DEEP)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _central_part(image: Image.Image) -> Image.Image:
    """The image, cut to about 50 short sides if it is longer."""
    longest = _MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    # As many pixels at both ends: the centre stays where it is.
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))
