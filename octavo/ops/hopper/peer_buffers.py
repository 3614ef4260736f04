"""A buffer on each rank's device that the ranks of its host can write: memory of the driver, opened by handles."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_size_t, c_ubyte, c_uint32, c_uint64
from pathlib import Path

from octavo.distributed import TensorParallel
from octavo.ops import ahead
from octavo.ops.hopper.compile import NoKernel, driver

__all__ = ["PeerBuffers", "connect"]

HOST = Path("/proc/sys/kernel/random/boot_id")
NONE = "none"  # in place of a host's identity
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", c_ubyte * 64)]


class PeerBuffers:
    """The addresses, in this process, of every rank's buffer of `size` bytes, in the order of ranks."""

    def __init__(self, addresses: list[int], size: int, rank: int):
        self.addresses, self.size, self.rank = addresses, size, rank

    def close(self, tp: TensorParallel) -> None:
        """Closes the others' buffers and frees this rank's. All ranks of `tp` call it, done with them."""
        own = self.addresses[self.rank]
        _close([address for address in self.addresses if address != own], own, tp)


def connect(tp: TensorParallel, size: int, word: int, refusal: str | None = None) -> PeerBuffers | str:
    """Buffers of `size` bytes filled with the 32-bit `word`, or the reason why ranks have none, the same on every rank.

    refusal: this rank's reason, if it wants none. All ranks of `tp` call it at the same place.
    """
    if refusal is None and ahead.collects():
        return PeerBuffers([0] * tp.size, size, tp.rank)
    own, given, opened = 0, "", list[int]()
    try:
        if refusal is None:
            own = _filled(size, word)
            given = f"{HOST.read_text().strip()} {_handle_of(own)}"
    except (NoKernel, OSError) as error:
        refusal = str(error)
    found = [one.partition(" ") for one in tp.sentences(given or f"{NONE} {refusal}")]
    others = [text for host, _, text in found if host == NONE]
    reason = refusal or next(iter(others), None)
    if reason is None and len({host for host, _, _ in found}) > 1:
        reason = "ranks of several hosts"
    if reason is None:
        try:
            opened += (own if rank == tp.rank else _open(text) for rank, (_, _, text) in enumerate(found))
        except NoKernel as error:
            reason = f"a peer's memory cannot be opened: {error}"
    refusals = [one for one in tp.sentences(reason or "") if one]
    if not refusals:
        return PeerBuffers(opened, size, tp.rank)
    _close([address for address in opened if address != own], own, tp)
    return refusals[0]


def _close(opened: list[int], own: int, tp: TensorParallel) -> None:
    for address in opened:
        driver("cuIpcCloseMemHandle", c_uint64(address))
    tp.least(0)  # nobody frees what another has open
    if own:
        driver("cuMemFree_v2", c_uint64(own))


def _filled(size: int, word: int) -> int:
    address = c_uint64()
    driver("cuMemAlloc_v2", byref(address), c_size_t(size))
    driver("cuMemsetD32_v2", address, c_uint32(word), c_size_t(size // 4))
    driver("cuCtxSynchronize")
    return address.value


def _handle_of(address: int) -> str:
    handle = _Handle()
    driver("cuIpcGetMemHandle", byref(handle), c_uint64(address))
    return bytes(handle.reserved).hex()


def _open(text: str) -> int:
    handle, address = _Handle((c_ubyte * 64).from_buffer_copy(bytes.fromhex(text))), c_uint64()
    driver("cuIpcOpenMemHandle_v2", byref(address), handle, c_uint32(LAZY_PEER_ACCESS))
    return address.value
