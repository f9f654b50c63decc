"""Tar files: the right images, or an error that names the file, the byte and the member."""

import io
import os
import resource
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from torch_feather.training.data import cache_folder
from torch_feather.training.data.archive import read_members
from torch_feather.training.data.find import find_images
from torch_feather.training.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def member(name, content=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


def archive(*members, format=tarfile.USTAR_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def pairs(numbers):
    """Return images with a .cls file each."""
    return [
        one
        for i in numbers
        for one in (member(f"{i:03}.png", png(i)), member(f"{i:03}.cls", str(i % 2).encode()))
    ]


@pytest.fixture
def shards(tmp_path):
    """Return a function that writes train-0.tar, and finds the training images."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "val-0.tar").write_bytes(archive(*pairs(range(4))))

    def find(content):
        (folder / "train-0.tar").write_bytes(content)
        return find_images(str(folder))[0]

    return find


def content_of(files):
    return [
        (bytes(name), int(label), int(files.decode(i)[0, 0, 0]))
        for i, (name, label) in enumerate(zip(files.names, files.labels, strict=True))
    ]


# A second class, as archives with one class are refused.
OTHERS = [member(f"{part}/b/1.png", png(9)) for part in ("train", "val")]
EXPECTED = [(f"{i:03}.png".encode(), i % 2, i) for i in (*range(0, 6, 2), *range(1, 6, 2))]
BLOCK = 512


def stripped(content):
    """Return an archive without its padding, but with an end mark of two blocks."""
    return content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % BLOCK + 2 * BLOCK)


def test_a_cut_at_any_byte_is_an_error_or_loses_only_padding(shards):
    whole = stripped(archive(*pairs(range(3))))
    end = len(whole) - BLOCK
    for length in range(0, len(whole) + 1, 7):
        if length >= end:  # the end mark is there
            assert len(shards(whole[:length])) == 3
            continue
        with pytest.raises(DataError, match=r"train-0\.tar: not a complete.* at byte \d+"):
            shards(whole[:length])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.slow
def test_a_changed_byte_gives_the_right_images_or_an_error(shards, format):
    whole = stripped(archive(*pairs(range(6)), format=format))
    assert content_of(shards(whole)) == EXPECTED
    labels = {m.start for m in members_of(whole) if m.name.endswith(b"cls")}
    messages = []
    for position in range(0, len(whole) - 2 * BLOCK, 11):
        if position in labels:  # a label has no checksum
            continue
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        try:
            found = content_of(shards(bytes(damaged)))
        except DataError as error:
            messages.append(str(error))
        else:
            assert found == EXPECTED, position
    assert len(messages) > 100
    assert all("train-0.tar" in message and "byte" in message for message in messages)


def members_of(content):
    import tempfile
    from pathlib import Path

    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        return list(read_members(Path(file.name)))


def test_a_block_of_zeros_within_the_archive_is_no_end(shards):
    whole = archive(*pairs(range(6)))
    header = members_of(whole)[4].header
    with pytest.raises(DataError, match=r"after the end mark at byte \d+, after 001\.cls"):
        shards(whole[:header] + bytes(BLOCK) + whole[header + BLOCK :])


def test_archives_end_to_end_are_an_error_that_names_the_byte(shards):
    first, second = archive(*pairs(range(3))), archive(*pairs(range(3, 6)))
    with pytest.raises(
        DataError, match=rf"another archive .* at byte {len(first)}, after 002\.cls"
    ):
        shards(first + second)


def test_an_error_is_not_cached_and_a_repaired_file_is_read(shards):
    whole = archive(*pairs(range(6)))
    for _ in range(2):
        with pytest.raises(DataError, match="at byte"):
            shards(whole[:3000])
    assert content_of(shards(whole)) == EXPECTED


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([member("000.png", png(9))], r"000\.png: is the path of the member at byte 0 too"),
        ([member("./000.png", png(9))], r"000\.png: is the path of the member at byte 0 too"),
        ([member("000.cls", b"1")], r"000\.cls: is the path of the member at byte \d+ too"),
        ([member("000.jpg", png(9))], r"000\.jpg: is the second image of 000\.cls"),
        ([member("009.cls", b"1")], r"009\.cls: is the class of an image that is missing"),
        ([member("009.png", png(9))], r"009\.png: is neither in the folder of a class nor has"),
        ([member("a/9.png", png(9))], r"a/9\.png: some images are in the folder .*/000\.png"),
        ([member("a/../9.png", png(9))], r"9\.png: has a path with '\.\.'"),
        (
            [member("9.png", type=tarfile.LNKTYPE, linkname="000.png")],
            r"9\.png: is a hard link\. Pack .*--hard-dereference",
        ),
        (
            [member("9.png", type=tarfile.SYMTYPE, linkname="000.png")],
            r"9\.png: is a symbolic link\. Pack",
        ),
        ([member("9.png", type=tarfile.FIFOTYPE)], r"9\.png: is no regular file"),
        (
            [member("a/b/9.png", png(1)), member("c", type=tarfile.SYMTYPE, linkname="./a")],
            r"c: is a link to a folder with images",
        ),
        ([member("9.png", png(9)), member("9.cls", b"9" * 30)], r"9\.cls: must contain the number"),
        ([member("9.png", png(9)), member("9.cls", b"9" * 19)], r"9\.cls: must contain the number"),
        ([member("9.png", png(9)), member("9.cls", b"1" * 99)], r"9\.cls: .*got 99 bytes"),
        ([member("9.png", png(9)), member("9.cls", b"")], r"9\.cls: must contain the number"),
    ],
)
def test_members_that_do_not_belong_together_are_named_with_their_offset(shards, more, message):
    with pytest.raises(DataError, match=message) as caught:
        shards(archive(*pairs(range(6)), *more))
    assert "train-0.tar" in str(caught.value)
    assert "byte" in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_image_of_another_format_is_not_left_out_without_a_word(shards, tmp_path):
    with pytest.raises(DataError, match=r"9\.cls: is the class of an image that is missing"):
        shards(archive(*pairs(range(6)), member("9.xyz", b"1"), member("9.cls", b"1")))
    with pytest.warns(UserWarning, match=r"9\.gif: images of this format are not read"):
        shards(archive(*pairs(range(6)), member("9.gif", b"1"), member("9.cls", b"1")))
    for shard in ("train-1.tar.gz", "train-2.tgz"):
        (tmp_path / "shards" / shard).write_bytes(b"")
        with pytest.raises(DataError, match=f"{shard}: is compressed"):
            shards(archive(*pairs(range(6))))
        (tmp_path / "shards" / shard).unlink()
    (tmp_path / "shards" / "train-00000-of-00005.tar").write_bytes(archive())
    with pytest.raises(
        DataError, match=r"has 2 of 5 train files, according to train-00000-of-00005"
    ):
        shards(archive(*pairs(range(6))))


def test_images_outside_of_the_parts_are_not_left_out_without_a_word(tmp_path):
    file = tmp_path / "a.tar"
    members = [member(f"{part}/a/0.png", png(1)) for part in ("train", "val", "Train", "more")]
    file.write_bytes(archive(*members, *OTHERS, member("set/readme.txt")))
    with pytest.warns(UserWarning, match=r"a\.tar/Train/a/0\.png and 1 more: in none of the"):
        assert len(find_images(str(file))[0]) == 2


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["n" * 300 + ".png", "\xe9" * 60 + ".png", "d/" * 80 + "x.png"])
def test_long_and_foreign_names(tmp_path, name, format):
    members = [member(f"{part}/a/{name}", png(1)) for part in ("train", "val")]
    file = tmp_path / "a.tar"
    file.write_bytes(archive(*members, *OTHERS, format=format))
    train, _, _ = find_images(str(file))
    assert train.names.tolist() == [f"train/a/{name}".encode(), b"train/b/1.png"]
    assert content_of(train)[0][2] == 1


def test_names_of_ustar_with_a_prefix(tmp_path):
    name = "train/a/" + "y" * 80 + "/" + "x" * 60 + ".png"
    file = tmp_path / "a.tar"
    members = [member(name, png(1)), member(name.replace("train", "val"), png(2))]
    file.write_bytes(archive(*members, *OTHERS))
    assert find_images(str(file))[0].names.tolist() == [name.encode(), b"train/b/1.png"]


def test_sizes_in_binary_and_in_pax_headers(tmp_path):
    content = png(3)
    info, _ = member("train/a/1.png", content)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\x80" + len(content).to_bytes(11, "big")
    padded = content + bytes(-len(content) % BLOCK)
    binary = bytes(with_checksum(header)) + padded
    info, _ = member("val/a/1.png", content)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"0" * 11 + b"\0"
    record = record_of(b"size", str(len(content)).encode())
    extended = extended_header(record)
    whole = (
        binary + extended + bytes(with_checksum(header)) + content + bytes(-len(content) % BLOCK)
    )
    file = tmp_path / "a.tar"
    file.write_bytes(whole + archive(*OTHERS))
    train, test, _ = find_images(str(file))
    assert [content_of(one)[0][2] for one in (train, test)] == [3, 3]


def with_checksum(header):
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def record_of(key, value):
    size = len(key) + len(value) + 3
    while size != len(b"%d %s=%s\n" % (size, key, value)):
        size = len(b"%d %s=%s\n" % (size, key, value))
    return b"%d %s=%s\n" % (size, key, value)


def extended_header(content, kind=b"x", size=None):
    info = tarfile.TarInfo("pax")
    info.size, info.type = len(content) if size is None else size, kind
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


@pytest.mark.parametrize(
    ("extended", "message"),
    [
        (extended_header(record_of(b"path", b"y" * 5000)), "a name of 5,000 bytes"),
        (extended_header(record_of(b"path", b"")), "a name of 0 bytes"),
        (extended_header(record_of(b"path", b"a\0b")), "a NUL in a name"),
        (extended_header(record_of(b"size", b"9" * 30)), "size .* is no number"),
        (extended_header(record_of(b"size", b"-1")), "size .* is no number"),
        (extended_header(record_of(b"size", b"9" * 18)), "but the file ends before them"),
        (extended_header(b"99 path=x\n"), "a damaged extended header"),
        (extended_header(b"path=x\n"), "a damaged extended header"),
        (extended_header(b"0 path=x\n"), "a damaged extended header"),
        (extended_header(record_of(b"a", b"b" * 2**21)), "an extended header of 2,"),
        (extended_header(b"", size=8**10), "an extended header of"),
        (extended_header(b"", b"L", size=10**6), "ends within an extended header"),
        (extended_header(b"y" * 5000, b"L"), "a name of 5,000 bytes"),
        (extended_header(record_of(b"path", b"x"), b"g"), "a global header sets"),
        (extended_header(record_of(b"GNU.sparse.map", b"0,1")), "is sparse"),
        (bytes(with_checksum(bytearray(tarfile.TarInfo("m").tobuf()[:156] + b"M" + bytes(355)))),
         "unsupported type b'M'"),
    ],
)  # fmt: skip
def test_headers_that_claim_too_much_are_refused(shards, extended, message):
    begin = archive(*pairs([0])).rstrip(b"\0")
    begin += bytes(-len(begin) % BLOCK)
    with pytest.raises(DataError, match=message) as caught:
        shards(begin + extended + archive(*pairs([1])))
    assert "at byte" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_extended_header_without_its_member_is_an_error(shards):
    begin = stripped(archive(*pairs([0])))[: -2 * BLOCK]
    with pytest.raises(DataError, match="an extended header without its member"):
        shards(begin + extended_header(record_of(b"path", b"x.png")) + bytes(2 * BLOCK))


@pytest.mark.parametrize("kinds", ["xx", "LL", "xL", "Lx"])
def test_two_names_for_one_member_are_an_error(shards, kinds):
    """Readers do not agree on which one holds."""
    content = {"x": b"14 path=c.png\n", "L": b"d.png\0"}
    headers = b""
    for kind in kinds:
        info = tarfile.TarInfo("header")
        info.type, info.size = kind.encode(), len(content[kind])
        headers += info.tobuf(tarfile.USTAR_FORMAT) + content[kind].ljust(BLOCK, b"\0")
    whole = archive(*pairs(range(2)))
    assert len(shards(whole)) == 2
    with pytest.raises(DataError, match="two extended headers for one member"):
        shards(headers + whole)


def test_sparse_members_of_gnu_tar_are_refused(shards):
    info, _ = member("9.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    with pytest.raises(DataError, match=r"9\.png is sparse"):
        shards(bytes(with_checksum(header)) + archive(*pairs([1])))


def test_the_index_takes_memory_in_proportion_to_its_members(tmp_path):
    names = [f"{part}/a/{i}.png" for part in ("train", "val") for i in range(1500)]
    long = "train/a/" + "y" * 4000 + ".png"
    members = [*(member(name) for name in (*names, long)), *OTHERS]
    file = tmp_path / "a.tar"
    file.write_bytes(archive(*members, format=tarfile.PAX_FORMAT))
    train, _, _ = find_images(str(file))
    assert len(train) == 1502
    assert train.names.text.nbytes < 60_000  # not 1,502 times the longest name
    assert max(train.names.tolist(), key=len) == long.encode()
    assert all(entry.stat().st_size < 400_000 for entry in cache_folder().iterdir())


def test_a_hole_behind_the_end_mark_is_skipped(shards, tmp_path):
    whole = archive(*pairs(range(6)))
    shards(whole)
    file = tmp_path / "shards" / "train-0.tar"
    os.truncate(file, 2**36)
    if file.stat().st_blocks * 512 > 2**30:
        pytest.skip("the file system has no holes")
    began = time.monotonic()
    assert len(find_images(str(tmp_path / "shards"))[0]) == 6
    assert time.monotonic() - began < 10


def test_memory_is_bounded_when_a_header_claims_terabytes(shards):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for claim in (8**11 - 1, 2**62):
        info, _ = member("9.cls")
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[124:136] = b"\x80" + claim.to_bytes(11, "big")
        with pytest.raises(DataError, match=r"9\.cls has .* bytes, but the file ends before them"):
            shards(bytes(with_checksum(header)) + archive(*pairs([1])))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("special", ["fifo", "folder", "device"])
def test_a_shard_that_is_no_regular_file_is_an_error(shards, tmp_path, special):
    shards(archive(*pairs(range(6))))
    path = tmp_path / "shards" / "train-1.tar"
    if special == "fifo":
        os.mkfifo(path)
    elif special == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"train-1\.tar: not a regular file"):
        find_images(str(tmp_path / "shards"))


def test_a_tar_file_truncated_after_it_was_indexed_is_an_error(shards, tmp_path):
    files = shards(archive(*pairs(range(6))))
    last = int(np.argmax(files.spans[:, 1]))
    os.truncate(tmp_path / "shards" / "train-0.tar", files.spans[last, 1] + 10)
    with pytest.raises(DataError, match=r"005\.png: .*truncated.*at byte \d+ of the tar file"):
        files.decode(last)


def test_members_agree_with_those_that_tarfile_finds(tmp_path):
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = tmp_path / "a.tar"
        names = ["a/b.png", "c" * 99, "d" * 100, "e/" * 40 + "f.txt", "g/"]
        members = [member(name, name.encode()) for name in names[:-1]]
        members.append(member("g", type=tarfile.DIRTYPE))
        members.append(member("h", type=tarfile.SYMTYPE, linkname="i" * 90))
        file.write_bytes(archive(*members, format=format))
        with tarfile.open(file) as tar:
            expected = [(m.name, m.offset_data, m.size, m.linkname) for m in tar]
        found = [
            (m.name.decode().rstrip("/"), m.start, m.size, m.target.decode())
            for m in read_members(file)
        ]
        assert found == expected
