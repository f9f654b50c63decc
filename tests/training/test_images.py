"""Decoding of images: every mode and format becomes what a viewer shows, or is refused by name."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from torch_feather.training.data import images
from torch_feather.training.data.images import decode_image

RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(0, 256, (6, 5), dtype=np.uint8)
COLOR = RANDOM.randint(0, 256, (6, 5, 3), dtype=np.uint8)
ALPHA = np.array([0, 255, 128, 255, 0, 64] * 5, dtype=np.uint8).reshape(6, 5)
WIDE = np.linspace(0, 65535, 30).astype(np.uint16).reshape(6, 5)


def encode(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def on_white(color, alpha):
    """Return the exact colors over white, float64 (H, W, 3)."""
    opacity = alpha[..., None] / 255
    return color * opacity + 255 * (1 - opacity)


def from_grey(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def raw_png(depth, kind, rows, *chunks):
    """Return a PNG file with `rows` of packed pixels, of width 5."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", 5, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM", "WEBP"])
def test_8_bits_are_read_without_loss(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(decode_image(encode(Image.fromarray(COLOR), format, **options)), COLOR)
    got = decode_image(encode(Image.fromarray(GREY), format, **options))
    assert np.array_equal(got, from_grey(GREY))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_black_and_white_pixels_are_0_and_255(format):
    bits = GREY > 127
    got = decode_image(encode(Image.fromarray(bits), format))
    assert np.array_equal(got, from_grey(bits * 255))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_to_8_and_never_clipped(format):
    got = decode_image(encode(Image.fromarray(WIDE), format))
    assert np.array_equal(got, from_grey(np.round(WIDE / 257)))


@pytest.mark.parametrize("largest", [1, 100, 255, 256, 1023, 4095, 65535])
def test_grey_values_of_a_pgm_file_are_scaled_by_the_largest_one(largest):
    values = (np.arange(30) * largest // 29).reshape(6, 5)
    raw = values.astype(">u2" if largest > 255 else "u1").tobytes()
    got = decode_image(b"P5 5 6 %d\n" % largest + raw)
    assert np.abs(got - from_grey(values / largest * 255)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_of_either_byte_order_in_tiff(order, compression):
    mode = "I;16" if order == "<" else "I;16B"
    image = Image.frombytes(mode, (5, 6), WIDE.astype(f"{order}u2").tobytes())
    content = encode(image, "TIFF", compression=compression)
    assert np.array_equal(decode_image(content), from_grey(np.round(WIDE / 257)))


def tiff(values, bits, **tags):
    """Return a TIFF file with one strip of raw grey values."""
    entries = {
        "ImageWidth": (256, 5), "ImageLength": (257, 6), "BitsPerSample": (258, bits),
        "Compression": (259, 1), "Photometric": (262, 1), "StripOffsets": (273, 8),
        "Orientation": (274, 1), "SamplesPerPixel": (277, 1), "RowsPerStrip": (278, 6),
        "StripByteCounts": (279, len(values)), "SampleFormat": (339, 1),
    }  # fmt: skip
    entries |= {name: (entries[name][0], value) for name, value in tags.items()}
    values += b"\0" * (len(values) % 2)
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.values())
    directory = struct.pack("<H", len(entries)) + rows + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + directory


def test_tiff_in_which_0_is_white():
    got = decode_image(tiff(WIDE.astype("<u2").tobytes(), 16, Photometric=0))
    assert np.array_equal(got, from_grey(255 - np.round(WIDE / 257)))
    got = decode_image(tiff(GREY.tobytes(), 8, Photometric=0))
    assert np.array_equal(got, from_grey(255 - GREY))


def test_tiff_of_12_bits_is_scaled_by_4095():
    values = np.linspace(0, 4095, 36).astype(int).reshape(6, 6)
    pairs = values.reshape(-1, 2)
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1]], 1
    )
    got = decode_image(tiff(packed.astype(np.uint8).tobytes(), 12, ImageWidth=6))
    assert np.array_equal(got, from_grey(np.round(values / 4095 * 255)))


@pytest.mark.parametrize(
    ("bits", "kind", "sample_format"),
    [(8, "<i1", 2), (16, "<i2", 2), (32, "<u4", 1), (32, "<i4", 2), (32, "<f4", 3)],
)
def test_pixels_without_a_defined_display_are_refused(bits, kind, sample_format):
    content = tiff(GREY.astype(kind).tobytes(), bits, SampleFormat=sample_format)
    with pytest.raises(ValueError, match=r"signed pixels|mode [IF] have no defined display"):
        decode_image(content)


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "F"),
        (encode(Image.fromarray(GREY.astype(np.float32)), "PPM"), "F"),
        (encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "signed"),
        (encode(Image.frombytes("LAB", (5, 6), COLOR.tobytes()), "TIFF"), "LAB"),
    ],
)
def test_modes_that_are_not_supported_are_refused_by_name(content, mode):
    with pytest.raises(ValueError, match=mode):
        decode_image(content)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_are_shown_on_white(mode, format):
    base = from_grey(GREY) if mode == "LA" else COLOR
    image = Image.fromarray(np.dstack([base, ALPHA])).convert(mode)
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    got = decode_image(encode(image, format, **options))
    # LA has the luma of grey pixels, which is rounded
    assert np.abs(got - on_white(base, ALPHA)).max() <= 1
    assert (got[ALPHA == 0] == 255).all()
    assert np.array_equal(got[ALPHA == 255], base[ALPHA == 255])


def test_an_opaque_alpha_channel_changes_nothing():
    image = Image.fromarray(np.dstack([COLOR, np.full_like(GREY, 255)]))
    assert np.array_equal(decode_image(encode(image, "PNG")), COLOR)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF"])
def test_palettes(format):
    indices = GREY % 4
    palette = RANDOM.randint(0, 256, (4, 3), dtype=np.uint8)
    image = Image.frombytes("P", (5, 6), indices.tobytes())
    image.putpalette(palette.tobytes())
    assert np.array_equal(decode_image(encode(image, format)), palette[indices])
    if format in ("PNG", "GIF"):
        got = decode_image(encode(image, format, transparency=2))
        assert np.array_equal(got, np.where((indices == 2)[..., None], 255, palette[indices]))
    if format == "PNG":
        alpha = np.array([0, 100, 200, 255], dtype=np.uint8)
        got = decode_image(encode(image, format, transparency=alpha.tobytes()))
        assert np.abs(got - on_white(palette[indices], alpha[indices])).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_value_of_png(depth):
    top = 2**depth - 1
    values = np.arange(30).reshape(6, 5) * 9 % (top + 1)
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        bits = [
            np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :] for row in values
        ]
        rows = [np.packbits(row.flatten()).tobytes() for row in bits]
    shown = (values * 255 + top // 2) // top
    assert np.array_equal(decode_image(raw_png(depth, 0, rows)), from_grey(shown))
    key = int(values[2, 3])
    got = decode_image(raw_png(depth, 0, rows, (b"tRNS", struct.pack(">H", key))))
    assert np.array_equal(got, from_grey(np.where(values == key, 255, shown)))


def test_a_transparent_color_of_png():
    rows = [row.tobytes() for row in COLOR]
    key = struct.pack(">HHH", *COLOR[1, 1].tolist())
    got = decode_image(raw_png(8, 2, rows, (b"tRNS", key)))
    match = (COLOR[1, 1] == COLOR).all(2, keepdims=True)
    assert np.array_equal(got, np.where(match, 255, COLOR))
    wide = [np.repeat(row, 2).tobytes() for row in COLOR]  # 257 times the value
    assert np.array_equal(decode_image(raw_png(16, 2, wide)), COLOR)
    with pytest.raises(ValueError, match="16 bits"):
        decode_image(raw_png(16, 2, wide, (b"tRNS", key)))


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bits_per_channel_of_png(kind, channels):
    values = RANDOM.randint(0, 65536, (6, 5, channels))
    got = decode_image(raw_png(16, kind, [row.astype(">u2").tobytes() for row in values])) / 255
    color = values / 65535
    if channels % 2 == 0:
        color = color[..., :-1] * color[..., -1:] + 1 - color[..., -1:]
    assert np.abs(got - color).max() <= 2.5 / 255  # Pillow keeps the higher 8 bits


def smooth(mode):
    ramp = np.add.outer(np.arange(32), np.arange(24)) * 4
    color = np.stack([ramp, ramp[::-1], np.full_like(ramp, 90)], 2).astype(np.uint8)
    return Image.fromarray(color).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_of_every_mode_is_close_to_its_image(mode):
    image = smooth(mode)
    got = decode_image(encode(image, "JPEG", quality=98))
    expected = np.asarray(image.convert("RGB"))
    assert np.abs(got - expected.astype(float)).mean() < 2


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_color_spaces_in_tiff(mode):
    image = smooth(mode)
    assert np.array_equal(decode_image(encode(image, "TIFF")), np.asarray(image.convert("RGB")))


ORIENTATIONS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),  # clockwise
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_by_exif_is_applied_once(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    if format == "JPEG":
        options = {"quality": 95}
    image = smooth("RGB")
    plain = decode_image(encode(image, format, **options))
    got = decode_image(encode(image, format, exif=exif, **options))
    assert got.flags.c_contiguous
    assert np.array_equal(got, ORIENTATIONS[orientation](plain))


def test_orientation_of_16_bits():
    exif = Image.Exif()
    exif[0x0112] = 6
    got = decode_image(encode(Image.fromarray(WIDE), "PNG", exif=exif))
    assert np.array_equal(got, from_grey(np.rot90(np.round(WIDE / 257), -1)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"x"]
)
def test_damaged_exif_data_has_no_orientation(exif):
    plain = encode(smooth("RGB"), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert np.array_equal(decode_image(plain[:2] + segment + plain[2:]), decode_image(plain))


# --- damage ------------------------------------------------------------------------------------

FILES = {
    "PNG": encode(Image.fromarray(COLOR), "PNG"),
    "PNG of 16 bits": encode(Image.fromarray(WIDE), "PNG"),
    "TIFF": encode(Image.fromarray(COLOR), "TIFF"),
    "compressed TIFF": encode(Image.fromarray(COLOR), "TIFF", compression="tiff_lzw"),
    "BMP": encode(Image.fromarray(COLOR), "BMP"),
    "PPM": encode(Image.fromarray(COLOR), "PPM"),
    "PGM of 16 bits": encode(Image.fromarray(WIDE), "PPM"),
    "WEBP": encode(Image.fromarray(COLOR), "WEBP", lossless=True),
    "lossy WEBP": encode(smooth("RGB"), "WEBP"),
    "JPEG": encode(smooth("RGB"), "JPEG"),
    "progressive JPEG": encode(smooth("RGB"), "JPEG", progressive=True),
    "GIF": encode(Image.fromarray(COLOR), "GIF"),
}


@pytest.mark.filterwarnings("ignore")  # of Pillow
@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_file_is_an_error_or_has_all_pixels(kind):
    content = FILES[kind]
    whole = decode_image(content)
    refused = 0
    for length in range(len(content)):
        try:
            got = decode_image(content[:length])
        except ValueError:
            refused += 1
        else:
            assert np.array_equal(got, whole), length
    assert refused > 0.8 * len(content)


@pytest.mark.parametrize("kind", ["PNG", "PNG of 16 bits"])
def test_a_changed_byte_of_a_png_file_is_an_error(kind):
    content = FILES[kind]
    for position in range(len(content)):
        for change in (1, 0x20, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= change
            with pytest.raises(ValueError):
                decode_image(bytes(damaged))


@pytest.mark.filterwarnings("ignore")  # of Pillow
@pytest.mark.parametrize("kind", FILES)
def test_a_changed_byte_raises_nothing_but_the_documented_error(kind, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10**5)  # some bytes are the size
    content, messages = FILES[kind], set()
    for position in range(min(len(content), 700)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        try:
            got = decode_image(bytes(damaged))
        except ValueError as error:
            messages.add(str(error))
        else:
            assert got.dtype == np.uint8
            assert got.ndim == 3
    assert messages
    assert all(message.isprintable() for message in messages)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20000, 20000), (10000, 10000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_refused_before_its_pixels_are_read(size):
    header = struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)
    bomb = bytearray(raw_png(1, 0, [b"\0"] * 3))
    bomb[16:29] = header
    bomb[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(ValueError, match=r"pixels"):
        decode_image(bytes(bomb))


def test_the_limit_of_pixels_holds_whatever_pillow_allows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "MAX_PIXELS", 29)
    with pytest.raises(ValueError, match="5x6 pixels, but at most 29 are supported"):
        decode_image(FILES["PNG"])


def test_16_bits_take_little_more_memory_than_8():
    """An image of the largest size must not need several gigabytes."""
    content = encode(Image.fromarray(np.full((500, 1000), 40_000, np.uint16)), "PNG")
    tracemalloc.start()
    try:
        assert (decode_image(content) == round(40_000 * 255 / 65_535)).all()
        assert tracemalloc.get_traced_memory()[1] < 12 * 500 * 1000
    finally:
        tracemalloc.stop()


def test_formats_that_run_programs_are_refused():
    eps = encode(Image.fromarray(COLOR), "EPS")
    with pytest.raises(ValueError, match="not a file of JPEG"):
        decode_image(eps)
