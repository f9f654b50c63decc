"""A target with known faults, for the tests of the fuzzing itself."""

from __future__ import annotations

import os
import signal

from .base import Target


class Broken(Target):
    """Fails at certain bytes, in every way that an input can fail."""

    traced = ("targets",)

    def seeds(self) -> list[bytes]:
        return [b"harmless"]

    def check(self, content: bytes) -> bool:
        if b"E" in content:
            raise KeyError("an error that is not one of the package")
        if b"M" in content:
            bytearray(200 * 2**20)
        if b"R" in content:
            bytearray(8 * 2**30)  # refused by the limit of the address space
        if b"T" in content:
            while True:
                pass
        if b"K" in content:
            os.kill(os.getpid(), signal.SIGKILL)
        return b"!" not in content


class Silent(Broken):
    """Has no fault."""

    def check(self, content: bytes) -> bool:
        return super().check(content.translate(None, b"EMRTK"))


class Three(Broken):
    """Fails at three bytes one after the other, which need three inputs that reach new lines."""

    def check(self, content: bytes) -> bool:
        at = content.find(b"a")
        if at < 0:
            return False
        at = content.find(b"b", at)
        if at < 0:
            return False
        at = content.find(b"c", at)
        if at < 0:
            return False
        raise ValueError("found")
