"""The members of a tar that nobody has to be trusted for: where their bytes are, read from the headers.

Nothing is extracted here and no name becomes a path by itself. Whatever is neither a plain file nor a folder (links,
devices, sparse files) is refused, and so are names that lead out of the archive.
"""

import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from contextual_cnn.errors import UserError
from contextual_cnn.text import shorten

BLOCK = 512
_LONGEST_HEADER = 2**20  # bytes; the name of a file has 4 kB at most


class TarMember(NamedTuple):
    """A plain file in a tar. offset: of its first byte in the tar's file."""

    name: str
    offset: int
    size: int


def list_tar(path: Path, start: int = 0, end: int | None = None) -> list[TarMember]:
    """The plain files of an uncompressed tar, in its order; only headers are read.

    Args:
        start, end: where the tar lies in the file, if it is itself a member of another.

    Raises:
        UserError: no tar, cut short, or with a member that is refused.
    """
    members = []
    try:
        with _Headers(path.open("rb", buffering=0)) as file:
            end = os.fstat(file.fileno()).st_size if end is None else end
            file.seek(start)
            archive = tarfile.open(fileobj=file, mode="r:", errorlevel=2)  # noqa: SIM115 - nothing to close but file
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # not in the stubs; it would keep every header
                if not info.isdir():
                    members.append(check_member(info, path))
                if info.offset_data + info.size > end:
                    raise tarfile.ReadError("unexpected end of data")
            # tarfile takes a damaged header for the end; the real one is a block of zeros
            if archive.offset + BLOCK > end or os.pread(file.fileno(), BLOCK, archive.offset).strip(b"\0"):
                raise tarfile.ReadError(f"no end mark at byte {archive.offset}")
    except UserError:
        raise
    except Exception as error:  # tarfile raises anything about a hostile header, from ValueError to RecursionError
        raise UserError(
            f"{path} cannot be read as a tar, it may be cut short: {error}", "copy or write the file again"
        ) from error
    return members


class _Headers(io.BufferedReader):
    """A tar's file for tarfile, which reads a header into memory whole, however long it claims to be."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def check_member(info: tarfile.TarInfo, path: Path) -> TarMember:
    """Where the bytes of a plain file are.

    Raises:
        UserError: any other kind of member, or a name that leads out of the archive.
    """
    if not info.isreg() or info.issparse():
        raise UserError(
            f"{path} holds {shorten(info.name)!r}, which is a link, a device or a sparse file",
            "only plain files are read; get the archive from a source that you trust",
        )
    if info.name.startswith("/") or ".." in info.name.split("/") or not info.name.isprintable():
        raise UserError(
            f"{path} holds {shorten(info.name)!r}, a name that leads out of the archive or cannot be printed",
            "get the archive from a source that you trust",
        )
    return TarMember(info.name, info.offset_data, info.size)
