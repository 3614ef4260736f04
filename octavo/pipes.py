"""Messages over multiprocessing's pipes whose large buffers, such as an image's pixels, go by shared memory.

A pipe holds some hundred KiB, so that whoever sends megabytes waits for whoever reads, once for each reader. The memory is a
file without a name (memfd_create), whose descriptor goes with the message: the system frees it with the last process that has
it, however that ends, and no size of /dev/shm limits it. Every reader maps the same pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import socket
import struct
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

__all__ = ["Incoming", "receive", "send"]

SMALL = 1 << 16  # bytes of a buffer that goes through the pipe itself
NAME = "octavo-message"  # as /proc shows it
_MARK = b"\0"  # before the sizes of buffers; a pickle begins otherwise
_ALIGNED = 64  # bytes: where buffers begin
READ = 1 << 17  # bytes that are taken at once, after which other work of an event loop gets a turn
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")  # multiprocessing's headers


def send(connections: Sequence[Connection], value: object) -> None:
    """Sends `value` to each. Where the system gives no such memory (EMFILE, seccomp), all of it goes through the pipe, as it
    does to another host.

    Raises OSError if a reader is gone.
    """
    buffers: list[memoryview] = []

    def goes_along(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes >= SMALL:
            buffers.append(raw)
        return raw.nbytes < SMALL

    if not connections:
        return
    data = pickle.dumps(value, 5, buffer_callback=goes_along)
    file, whole = None, data
    if buffers:
        with suppress(OSError):
            file = _filled(buffers)
        if file is None or not all(map(_is_local, connections)):
            whole = pickle.dumps(value, 5)
    try:
        for connection in connections:
            if file is None or not _is_local(connection):
                connection.send_bytes(whole)
                continue
            connection.send_bytes(_MARK + struct.pack(f"={len(buffers)}Q", *(buffer.nbytes for buffer in buffers)))
            send_handle(connection, file, None)
            connection.send_bytes(data)
    finally:
        if file is not None:
            os.close(file)


def receive(connection: Connection) -> Any:
    """The next value, whose buffers may be written: other readers do not see it. Raises EOFError or OSError if no more come."""
    data = connection.recv_bytes()
    if not data.startswith(_MARK):
        return pickle.loads(data)
    sizes = struct.unpack(f"={(len(data) - 1) // 8}Q", data[1:])
    try:
        file = recv_handle(connection)
    except RuntimeError as error:  # no descriptor is left
        raise OSError(str(error)) from None
    try:
        memory, found, at = _mapped(file, sum(map(_rounded, sizes))), [], 0
    finally:
        os.close(file)
    for size in sizes:
        found.append(memory[at : at + size])
        at += _rounded(size)
    return pickle.loads(connection.recv_bytes(), buffers=found)


class Incoming:
    """Takes messages from a connection without waiting, for an event loop; the other end sends them by `Connection.send`.

    A thread that waits for each would have to get the interpreter's lock several times a message, for which a busy event loop
    lets it wait 5 ms each time.
    """

    def __init__(self, connection: Connection):
        self._connection, self._come = connection, bytearray()
        self._room = memoryview(bytearray(READ))  # bytes of that number, made for each reading, would be pages of the system's

    def fileno(self) -> int:
        return self._connection.fileno()

    def take(self) -> list[Any]:
        """The messages that are there as a whole, possibly none. To be called when the descriptor can be read; raises EOFError
        or OSError if no more come.
        """
        if not (read := os.readv(self._connection.fileno(), [self._room])):
            raise EOFError
        self._come += self._room[:read]
        found, at = [], 0
        while (whole := self._message(at)) is not None:
            begin, end = whole
            with memoryview(self._come) as come:
                found.append(pickle.loads(come[begin:end]))
            at = end
        del self._come[:at]
        return found

    def _message(self, at: int) -> tuple[int, int] | None:
        """Where the message whose header is at `at` begins and ends, if it is there. multiprocessing's header: 4 bytes of its
        length, or -1 and 8 bytes."""
        if len(self._come) < at + 4:
            return None
        (size,), begin = _SHORT.unpack_from(self._come, at), at + 4
        if size == -1:
            if len(self._come) < at + 12:
                return None
            (size,), begin = _LONG.unpack_from(self._come, at + 4), at + 12
        return (begin, begin + size) if len(self._come) >= begin + size else None


def _is_local(connection: Connection) -> bool:
    """Whether the other end is on this host, so that a descriptor can go with a message."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        return end.family == socket.AF_UNIX


def _rounded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _filled(buffers: Sequence[memoryview]) -> int:
    """The descriptor of a file with these buffers in it."""
    file, at = os.memfd_create(NAME), 0
    try:
        for buffer in buffers:
            written = 0
            while written < buffer.nbytes:
                written += os.pwrite(file, buffer[written:], at + written)
            at += _rounded(buffer.nbytes)
        os.ftruncate(file, at)
    except BaseException:
        os.close(file)
        raise
    return file


def _mapped(file: int, size: int) -> memoryview:
    """A private mapping of a file, for as long as anything refers to it. (Python's own keeps a descriptor for each, of which a
    process has 1,024.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_char * size).from_address(address)
    weakref.finalize(memory, libc.munmap, address, size).atexit = False
    return memoryview(memory).cast("B")
