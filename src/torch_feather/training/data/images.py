"""Decode images of every mode and depth to 8-bit RGB, as a viewer shows them.

Orientation by EXIF is applied. 16-bit values are scaled to 8 bits. Transparent pixels are shown on
white. Pixels whose display is not defined, such as floats, are an error.
"""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import install_hint
from ..errors import DataError, printable

if TYPE_CHECKING:
    import PIL.Image

VERSION = 2  # changes if the pixels of an image change; caches of other versions are not used
MAX_PIXELS = 89_478_485  # per image, the default limit of Pillow
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")  # others, such as EPS, run programs

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT, _ORIENTATION = 258, 262, 339, 0x0112


def decode_image(content: bytes) -> np.ndarray:
    """Return the pixels of an encoded image, uint8 (H, W, 3).

    Args:
        content: the bytes of the file.

    Raises:
        ValueError: the image is damaged, truncated or too large, or its pixels have no defined
            display.
        DataError: Pillow is not installed.

    Example:
        >>> decode_image(b"P5 2 1 65535 " + bytes([255, 255, 128, 128])).tolist()
        [[[255, 255, 255], [128, 128, 128]]]
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"images require Pillow. {install_hint('train')}") from None
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                raise ValueError(
                    f"{image.width}x{image.height} pixels, but at most {MAX_PIXELS:,} are supported"
                )
            depth = 8
            if content.startswith(_PNG):
                _check_png(content)
                depth = content[24]  # bits per channel, in the first chunk
            image.load()
            return np.ascontiguousarray(_orient(_rgb(image, depth), image))
    except UnidentifiedImageError:
        reason = f"not a file of {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(printable(reason))


def rgb_pixels(image: PIL.Image.Image) -> np.ndarray:
    """Return the pixels of an image of Pillow, uint8 (H, W, 3); its orientation is kept.

    Args:
        image: the image.

    Raises:
        ValueError: its pixels have no defined display.

    Example:
        >>> from PIL import Image
        >>> rgb_pixels(Image.new("L", (2, 1), color=7)).tolist()
        [[[7, 7, 7], [7, 7, 7]]]
    """
    try:
        image.load()
        return np.ascontiguousarray(_rgb(image, 8))
    except Exception as error:  # of a file that is read only now
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(printable(reason))


def _check_png(content: bytes) -> None:
    """Raise a ValueError if a chunk is cut or damaged; Pillow does not check pixels."""
    view, position, kind = memoryview(content), len(_PNG), b""
    while kind != b"IEND":
        end = position + 12 + int.from_bytes(view[position : position + 4], "big")
        if len(view) < max(end, position + 12):
            raise ValueError(f"the file is truncated: it ends at byte {len(view)}")
        kind = bytes(view[position + 4 : position + 8])
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ValueError(f"wrong checksum of the chunk at byte {position}")
        position = end


def _rgb(image: PIL.Image.Image, depth: int) -> np.ndarray:
    """Return the pixels of a loaded image of `depth` bits before its orientation is applied."""
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF file
    if 2 in tags.get(_TIFF_SAMPLE_FORMAT, ()):
        raise ValueError("signed pixels; convert them to unsigned ones of 8 or 16 bits")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        return _from_16_bits(image, tags)
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise ValueError(
            f"pixels of mode {image.mode} have no defined display; convert them to 8 or 16 bits "
            "per channel, grey or RGB"
        )
    transparent = image.info.get("transparency")
    if image.mode in ("1", "L", "RGB"):
        pixels = np.array(image.convert("RGB"))
        if transparent is not None:
            _whiten(pixels, transparent, 8 if image.mode == "1" else depth)
        return pixels
    palette: Any = image.palette if image.mode == "P" else None
    if palette is not None and (transparent is not None or palette.mode == "RGBA"):
        return _on_white(image)
    return _on_white(image) if image.mode[-1] in "Aa" else np.array(image.convert("RGB"))


def _from_16_bits(image: PIL.Image.Image, tags: Any) -> np.ndarray:
    stored = np.asarray(image)
    largest = 2 ** max(tags.get(_TIFF_BITS, (16,))) - 1
    if stored.min() < 0 or stored.max() > largest:
        raise ValueError(f"grey values beyond {largest}")
    values = stored.astype(np.uint32)  # in place from here on, because an image may be large
    values *= 255
    values += largest // 2
    values //= largest
    grey = values.astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # 0 is white; Pillow inverts only 8 bits
        grey = 255 - grey
    if (transparent := image.info.get("transparency")) is not None:
        grey[stored == transparent] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def _whiten(pixels: np.ndarray, color: Any, depth: int) -> None:
    """Show the pixels of a color that is transparent, stored in `depth` bits, as white."""
    if depth > 8:
        raise ValueError("a transparent color of 16 bits; use an alpha channel or 8 bits")
    pixels[(pixels == np.array(color) * 255 // (2**depth - 1)).all(2)] = 255


def _on_white(image: PIL.Image.Image) -> np.ndarray:
    from PIL import Image

    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def _orient(pixels: np.ndarray, image: PIL.Image.Image) -> np.ndarray:
    """Apply the orientation by EXIF; damaged EXIF data has none."""
    if image.format == "TIFF":  # Pillow has applied it
        return pixels
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
