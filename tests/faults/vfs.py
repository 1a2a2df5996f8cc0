"""A disk that can be watched and made to fail: a VFS of SQLite between it and the real one.

https://sqlite.org/vfs.html. A copy of the default VFS with an ``xOpen`` and an ``xDelete`` of ours;
the files it opens have an ``xWrite``, ``xTruncate`` and ``xSync`` of ours. These ask a handler. All
else (locks, shared memory, reads) goes straight to the original. What is open keeps the methods it
was opened with, so nothing made here is ever freed.
"""

import ctypes
import importlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from typing import Final, Literal, NamedTuple

import pytest

OK: Final = 0
FULL: Final = 13
IOERR: Final = 10
IOERR_WRITE: Final = IOERR | 3 << 8
IOERR_FSYNC: Final = IOERR | 4 << 8
IOERR_TRUNCATE: Final = IOERR | 6 << 8

OPEN_JOURNAL: Final = 0x00000800 | 0x00004000 | 0x00080000
"""``xOpen``'s flags of files whose first sync syncs their folder too: journals and WALs."""


class Operation(NamedTuple):
    """Something done to a file: ``data`` written at ``offset``, or ``offset`` bytes left of it.

    An ``open`` is told only of a file that was not there.
    """

    kind: Literal["open", "write", "truncate", "sync", "delete"]
    path: str
    offset: int = 0
    data: bytes = b""
    flags: int = 0


Proceed = Callable[[Operation], int]
Handler = Callable[[Operation, Proceed], int]
"""Gets an operation and what carries one out; returns the result code SQLite is to see."""

_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Delete = CFUNCTYPE(c_int, c_void_p, c_char_p, c_int)
_Close = CFUNCTYPE(c_int, c_void_p)
_Write = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Truncate = CFUNCTYPE(c_int, c_void_p, c_int64)
_Sync = CFUNCTYPE(c_int, c_void_p, c_int)


class _Vfs(Structure):
    """``sqlite3_vfs`` (version 3)."""

    _fields_ = [
        ("iVersion", c_int),
        ("szOsFile", c_int),
        ("mxPathname", c_int),
        ("pNext", c_void_p),
        ("zName", c_char_p),
        ("pAppData", c_void_p),
        ("xOpen", _Open),
        ("xDelete", _Delete),
        ("others", c_void_p * 14),
    ]


class _Methods(Structure):
    """``sqlite3_io_methods`` (version 3)."""

    _fields_ = [
        ("iVersion", c_int),
        ("xClose", _Close),
        ("xRead", c_void_p),
        ("xWrite", _Write),
        ("xTruncate", _Truncate),
        ("xSync", _Sync),
        ("others", c_void_p * 13),
    ]


class _File(Structure):
    """``sqlite3_file``: what any VFS's own structure begins with."""

    _fields_ = [("pMethods", POINTER(_Methods))]


class Vfs:
    """The watching VFS. There is one: :func:`watched` makes it the default for a while."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.sqlite3_vfs_find.restype = POINTER(_Vfs)
        library.sqlite3_vfs_register.argtypes = [POINTER(_Vfs), c_int]
        self._register = library.sqlite3_vfs_register
        self._original = library.sqlite3_vfs_find(None)
        self._own = _Vfs.from_buffer_copy(self._original.contents)
        self._own.zName = b"watched"
        self._own.xOpen = _Open(self._open)
        self._own.xDelete = _Delete(self._delete)
        self._methods: dict[int, tuple[_Methods, _Methods]] = {}  # original and own, by its address
        self._files: dict[int, tuple[_Methods, str]] = {}  # original methods and path, by address
        self._handler: Handler | None = None
        self.raised: list[Exception] = []

    def begin(self, handler: Handler) -> None:
        """Ask ``handler``, for every file that is opened from now on."""
        assert self._handler is None, "one handler at a time"
        self._handler = handler
        self.raised.clear()
        self._register(ctypes.byref(self._own), 1)

    def end(self) -> None:
        """Let everything through again."""
        self._register(ctypes.byref(self._own), 0)
        self._register(self._original, 1)
        self._handler = None

    def _open(self, _: int, name: int | None, file: int, flags: int, out: int | None) -> int:
        path = "" if name is None else os.fsdecode(ctypes.string_at(name))
        is_new = name is not None and not os.path.exists(path)  # noqa: PTH110 - no Path per call
        opened: int = self._original.contents.xOpen(
            ctypes.addressof(self._original.contents), name, file, flags, out
        )
        found = _File.from_address(file)
        if opened != OK or name is None or not found.pMethods:
            return opened
        address = ctypes.addressof(found.pMethods.contents)
        if address not in self._methods:
            self._methods[address] = (found.pMethods.contents, self._watching(found))
        original, own = self._methods[address]
        self._files[file] = original, path
        found.pMethods = ctypes.pointer(own)
        if is_new:
            self._ask(Operation("open", path, flags=flags), lambda _: OK)
        return opened

    def _watching(self, file: _File) -> _Methods:
        own = _Methods.from_buffer_copy(file.pMethods.contents)
        own.xWrite = _Write(self._write)
        own.xTruncate = _Truncate(self._truncate)
        own.xSync = _Sync(self._sync)
        return own

    def _write(self, file: int, data: int, size: int, offset: int) -> int:
        original, path = self._files[file]

        def carry_out(one: Operation) -> int:
            result: int = original.xWrite(file, one.data, len(one.data), one.offset)
            return result

        return self._ask(Operation("write", path, offset, ctypes.string_at(data, size)), carry_out)

    def _truncate(self, file: int, size: int) -> int:
        original, path = self._files[file]
        return self._ask(
            Operation("truncate", path, size), lambda one: original.xTruncate(file, one.offset)
        )

    def _sync(self, file: int, flags: int) -> int:
        original, path = self._files[file]
        return self._ask(Operation("sync", path), lambda _: original.xSync(file, flags))

    def _delete(self, _: int, name: bytes, sync_folder: int) -> int:
        original = self._original.contents
        return self._ask(
            Operation("delete", os.fsdecode(name), flags=sync_folder),
            lambda _: original.xDelete(ctypes.addressof(original), name, sync_folder),
        )

    def _ask(self, operation: Operation, proceed: Proceed) -> int:
        if self._handler is None:
            return proceed(operation)
        try:
            return self._handler(operation, proceed)
        except Exception as error:  # it must not leave through SQLite: see watched()
            self.raised.append(error)
            return IOERR


def _watching_vfs() -> Vfs | None:
    """The VFS, if Python's ``sqlite3`` uses a library that others can reach too."""
    with suppress(ImportError, AttributeError, OSError, sqlite3.Error):
        vfs = Vfs(ctypes.CDLL(importlib.import_module("_sqlite3").__file__))
        vfs.end()
        sqlite3.connect("file::memory:?vfs=watched", uri=True).close()
        return vfs
    return None


_vfs: Final = _watching_vfs()

needs_vfs: Final = pytest.mark.skipif(
    _vfs is None, reason="Python's sqlite3 has SQLite built in, where no VFS can be added from here"
)


def watch(handler: Handler) -> None:
    """Ask ``handler`` from now on, in all of this process, until it ends."""
    assert _vfs is not None
    _vfs.begin(handler)


@contextmanager
def watched(handler: Handler) -> Iterator[None]:
    """Ask ``handler`` about every file that is opened within, as long as this lasts.

    What it raises is an I/O error to SQLite, and is raised at the end.
    """
    assert _vfs is not None
    watch(handler)
    try:
        yield
    finally:
        _vfs.end()
    if _vfs.raised:
        raise _vfs.raised[0]


def without_syncs(operation: Operation, proceed: Proceed) -> int:
    """A disk that never waits, for tests that cut the power of their own disk only."""
    return OK if operation.kind == "sync" else proceed(operation)
