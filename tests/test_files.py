"""Replacing a file: atomic, and without a change of who can read it."""

import errno
import os
import re
import stat
import struct
from pathlib import Path

import pytest

from torch_feather.errors import ConfigurationError
from torch_feather.files import ACL, replace_file, to_path

MODES = [0o600, 0o640, 0o644, 0o444, 0o755, 0o4755, 0o2750, 0o604]


@pytest.fixture
def umask():
    """Sets the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def replace(path, content=b"new"):
    replace_file(path, lambda file: file.write(content))
    assert path.read_bytes() == content


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"'{tmp_path / 'missing'}'")):
        replace_file(tmp_path / "missing" / "file", lambda file: file.write(b"new"))


@pytest.mark.parametrize("mode", MODES, ids=oct)
@pytest.mark.parametrize("mask", [0, 0o022, 0o077], ids=oct)
def test_a_replaced_file_keeps_its_mode(tmp_path, umask, mode, mask):
    umask(mask)
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    replace(path)
    assert mode_of(path) == mode


@pytest.mark.parametrize("mask", [0, 0o022, 0o027, 0o077], ids=oct)
def test_a_new_file_has_the_mode_of_the_umask(tmp_path, umask, mask):
    umask(mask)
    replace(tmp_path / "file")
    assert mode_of(tmp_path / "file") == 0o666 & ~mask


def test_nobody_else_can_read_the_temporary_file_of_a_private_file(tmp_path, umask):
    umask(0)
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    modes = []

    def write(file):
        file.write(b"new")
        modes.extend(mode_of(other) for other in tmp_path.iterdir() if other != path)

    replace_file(path, write)
    assert modes == [0o600]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_a_replaced_file_keeps_its_owner_and_group(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 12345, 54321)
    path.chmod(0o6750)
    replace(path)
    status = path.stat()
    assert (status.st_uid, status.st_gid, mode_of(path)) == (12345, 54321, 0o6750)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(0o640, 0o600), (0o644, 0o644), (0o664, 0o644), (0o604, 0o600), (0o2770, 0o700)],
    ids=oct,
)
def test_another_group_gets_no_access_that_all_others_had_not(
    tmp_path, monkeypatch, mode, expected
):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)

    def refuse(_, user, group):
        if group != -1:
            raise PermissionError

    monkeypatch.setattr(os, "chown", refuse)
    replace(path)
    assert mode_of(path) == expected


def access_list(*entries):
    """Return an access control list in the form of Linux: tag, permissions, id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 2**32 - 1
USER, OWNER, GROUP, MASK, OTHERS = 2, 1, 4, 16, 32  # tags
LIST = access_list(
    (OWNER, 6, NOBODY), (USER, 4, 12345), (GROUP, 0, NOBODY), (MASK, 4, NOBODY), (OTHERS, 0, NOBODY)
)


def set_list(path, name, value):
    try:
        os.setxattr(path, name, value)
    except (AttributeError, OSError) as error:
        pytest.skip(f"no access control lists here ({error})")


def test_a_replaced_file_keeps_its_access_control_list(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    set_list(path, ACL, LIST)
    replace(path)
    assert os.getxattr(path, ACL) == LIST


def test_a_replaced_file_does_not_take_the_access_control_list_of_its_directory(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    set_list(tmp_path, "system.posix_acl_default", LIST)
    replace(path)
    assert ACL not in os.listxattr(path)
    assert mode_of(path) == 0o640


def test_the_target_of_a_symbolic_link_is_replaced(tmp_path):
    target, link, chain = tmp_path / "a" / "target", tmp_path / "link", tmp_path / "chain"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("a/target")
    chain.symlink_to("link")
    replace(chain)
    assert target.read_bytes() == b"new"
    assert mode_of(target) == 0o640
    assert link.is_symlink()
    assert chain.is_symlink()


def test_a_link_to_nothing_creates_its_target(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("target")
    replace(link)
    assert link.is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["pipe", "directory", "loop", "device"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to("loop")
    else:
        path.symlink_to("/dev/null")
    before = os.lstat(path)
    with pytest.raises(OSError, match=r"regular|directory|symbolic links") as caught:
        replace_file(path, lambda file: file.write(b"new"))
    assert caught.value.errno in (errno.EINVAL, errno.EISDIR, errno.ELOOP)
    assert os.lstat(path).st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    for letter in "aü":
        name = letter * (255 // len(letter.encode()))
        replace(tmp_path / name)


def test_an_error_keeps_content_and_mode(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)

    def fail(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail)
    assert (path.read_text(), mode_of(path)) == ("old", 0o640)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["a", Path("a"), "a/../b", "ü", "\udcff"])
def test_paths(path):
    assert to_path(path) == Path(path)


@pytest.mark.parametrize("path", [None, 1, b"a", "", "\0", "\ud800", Path])
def test_what_is_no_path(path):
    with pytest.raises(ConfigurationError, match="is not the path of a file"):
        to_path(path)
