"""LoRA files that the page sends to have them looked at: temporary files, which are removed unless the user saves them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ....trainer_core.errors import UserError
from ....trainer_core.runs.layout import LORAS
from ....trainer_core.storage.atomic import TEMPORARY, remove_temporaries, replace_atomic
from ....trainer_core.storage.bounded_files import format_size
from ....trainer_core.storage.lora_name import ENDING, faults_of_name, free_path
from ....trainer_core.storage.safetensors_header import MAX_BYTES, read_header

MAX_UPLOAD = 8 << 30  # a LoRA of rank 512 for every layer of Flux has 7 GB in bf16
SPARE_BYTES = 1 << 30  # of disk space that stays free
MAX_FILES = 2  # the newest uploads that stay, for two open pages
MAX_AGE = 3600.0  # seconds
FOLDER = "uploads"
NAME = "upload"  # of a file whose own name can't be used


@dataclass(frozen=True)
class Upload:
    """A file that was sent.

    Attributes:
        token: The page's key to it.
        name: Name of the file, ending in .safetensors.
        path: Where it is.
        time: When it was complete, in seconds of the clock.
    """

    token: str
    name: str
    path: Path
    time: float


class Uploads:
    """The files that were sent.

    Args:
        cache: Returns the folder for temporary files.
        clock: Returns the time in seconds.
        max_bytes: Limit of a file's size.
    """

    def __init__(
        self, cache: Callable[[], Path], clock: Callable[[], float] = time.monotonic, max_bytes: int = MAX_UPLOAD
    ):
        self._cache, self._clock, self.max_bytes = cache, clock, max_bytes
        self._files: dict[str, Upload] = {}
        self._is_clean = False

    async def receive(self, name: str, size: int | None, chunks: AsyncIterator[bytes]) -> Upload:
        """Write a file, and return it. Older ones are removed.

        Args:
            name: Its name on the user's machine.
            size: Its size in bytes, if it is announced.
            chunks: Its bytes.
        Raises:
            UserError: It is too large, or not a safetensors file.
        """
        self._refuse_large(size or 0)
        folder = self._folder()
        self._refuse_full_disk(folder, size or 0)
        handle, text = tempfile.mkstemp(prefix=TEMPORARY, suffix=ENDING, dir=folder)
        path = Path(text)
        try:
            with os.fdopen(handle, "wb") as stream:
                await self._write(stream, folder, chunks)
            _refuse_other_format(path)
        except BaseException:  # the page may leave in the middle
            path.unlink(missing_ok=True)
            raise
        upload = Upload(secrets.token_urlsafe(16), usable_name(name), path, self._clock())
        self._files[upload.token] = upload
        self.expire()
        return upload

    async def _write(self, stream: BinaryIO, folder: Path, chunks: AsyncIterator[bytes]) -> None:
        start = b""
        async for chunk in chunks:
            if len(start) < 9:
                start += chunk[:9]
                _refuse_other_start(start)
            self._refuse_large(stream.tell() + len(chunk))
            self._refuse_full_disk(folder, len(chunk))
            stream.write(chunk)

    def _refuse_large(self, size: int) -> None:
        if size > self.max_bytes:
            raise UserError.at(
                "upload",
                f"is larger than {format_size(self.max_bytes)}; put it into ComfyUI's folder of LoRAs and pick it there",
            )

    def _refuse_full_disk(self, folder: Path, size: int) -> None:
        if shutil.disk_usage(folder).free < size + SPARE_BYTES:
            raise UserError.at(
                "upload", f"needs {format_size(size)}, and the disk of {folder} has not enough left; free disk space"
            )

    def find(self, token: str) -> Upload:
        """Return an upload.

        Raises:
            UserError: It is not there any more.
        """
        self.expire()
        upload = self._files.get(token)
        if upload is None:
            raise UserError.at("upload", "is not there any more; drop the file again")
        return upload

    def expire(self) -> None:
        """Remove what is old, and all but the newest."""
        now, uploads = self._clock(), list(self._files.values())
        for place, upload in enumerate(uploads):
            if now - upload.time > MAX_AGE or place < len(uploads) - MAX_FILES:
                self.remove(upload.token)

    def remove(self, token: str) -> None:
        """Remove an upload, if it is there."""
        upload = self._files.pop(token, None)
        if upload:
            upload.path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all."""
        for token in list(self._files):
            self.remove(token)

    def save(self, token: str, output: Path) -> Path:
        """Copy an upload into the output folder's LoRAs, under a name that no file has. Return the file.

        Raises:
            UserError: It is not there any more.
            OSError: It can't be written.
        """
        upload = self.find(token)
        target = free_path(output / LORAS / upload.name)
        replace_atomic(target, lambda temporary: shutil.copyfile(upload.path, temporary))
        return target

    def _folder(self) -> Path:
        folder = self._cache() / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if not self._is_clean:  # what a killed ComfyUI left behind; another one may share the folder
            remove_temporaries(folder, MAX_AGE)
            self._is_clean = True
        return folder


def usable_name(name: str) -> str:
    """Return the last part of a file's name, as a name that a LoRA can have on every system."""
    last = re.split(r"[/\\]", name)[-1]
    stem = last[: -len(ENDING)] if last.lower().endswith(ENDING) else last
    return f"{NAME if not stem.strip() or faults_of_name(stem) else stem}{ENDING}"


def _refuse_other_start(start: bytes) -> None:
    """Refuse what can't be a safetensors file by its first bytes: the size of its header, and a JSON object."""
    size = int.from_bytes(start[:8], "little") if len(start) >= 8 else 2
    if not 2 <= size <= MAX_BYTES or start[8:9] not in (b"", b"{"):
        raise UserError.at("upload", "is not a safetensors file; drop a LoRA that ends in .safetensors")


def _refuse_other_format(path: Path) -> None:
    try:
        read_header(path)
    except ValueError as error:
        raise UserError.at(
            "upload", f"is not a safetensors file ({error}); drop a LoRA that ends in .safetensors"
        ) from error
