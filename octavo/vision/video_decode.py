"""A video's bytes -> the frames that are asked for, by PyAV, which brings FFmpeg; what cannot be decoded gets one sentence.

FFmpeg opens a file by what its bytes look like, and playlists name other files and hosts, so the container is chosen here, from
few. A frame stands upright as the file says. Frames are counted in the order in which they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.errors import InvalidRequest

__all__ = ["VideoFile", "VideoLimits", "open_video"]

# FFmpeg knows hundreds more, of which many are looked at by nobody.
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libaom-av1", "libvpx-vp9", "mpeg4", "mpeg2video", "mjpeg", "ffv1")
_KNOWN = "MP4, QuickTime, WebM, Matroska and AVI"
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # that a file of MP4's family begins with
_THREADS = 2


class VideoLimits(NamedTuple):
    """Of one video: its file's bytes, its length in seconds and in frames, decoded or not, and the pixels of a frame."""

    bytes: int = 64 << 20
    seconds: float = 1800.0
    frames: int = 60_000
    pixels: int = 4096 * 2304


class VideoFile:
    """An open video. frames: how many it has. fps: of them, a second."""

    def __init__(self, container: Any, limits: VideoLimits):
        self._container, self._limits = container, limits
        if not container.streams.video:
            raise InvalidRequest("A video's file has no pictures in it; send one that has.")
        self._stream = stream = container.streams.video[0]
        context = stream.codec_context
        if context is None or context.name not in _CODECS:
            told = "unknown" if context is None else context.name
            raise InvalidRequest(f"A video's codec ({told}) is not read here; send it as H.264, H.265, VP9 or AV1.")
        self._check_pixels(context.width, context.height)
        context.options = {"max_pixels": str(limits.pixels)}
        context.thread_type, context.thread_count = "AUTO", _THREADS
        self.frames = self._counted()
        rate = stream.average_rate or stream.guessed_rate
        self.fps = float(rate) if rate else 24.0
        if self.frames > limits.frames or self.frames > limits.seconds * self.fps:
            raise InvalidRequest(
                f"A video has {self.frames} frames in {self.frames / self.fps:.0f} seconds; at most {limits.frames} frames and "
                f"{limits.seconds:g} seconds are read: send a shorter part."
            )

    def _check_pixels(self, columns: int, rows: int) -> None:
        if columns * rows > self._limits.pixels:
            raise InvalidRequest(
                f"A video has {columns} x {rows} pixels; at most {self._limits.pixels:,} are decoded: make it smaller."
            )

    def _counted(self) -> int:
        """Of the packets, without decoding: many headers do not say, or count what an edit list leaves out. Raises
        InvalidRequest where a packet is there in part, or none is.
        """
        found = 0
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt:
                raise InvalidRequest(f"A video is cut off after {found} frames; send it again.")
            found += bool(packet.size) and not packet.is_discard
            if found > self._limits.frames:
                break
        if not found:
            raise InvalidRequest("A video has no frames, or is cut off before the first; send it again.")
        self._container.seek(0)
        return found

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames of the given numbers, which do not go down, RGB [rows, columns, 3]. Where a few at the end cannot be
        decoded, the last that can stands for them. Raises InvalidRequest for more damage.
        """
        left, number, frame = list(indices), -1, None
        with _one_sentence():
            for number, frame in enumerate(self._container.decode(self._stream)):
                if number == left[0]:
                    pixels = self._pixels(frame)
                    while left and left[0] == number:
                        yield pixels
                        left.pop(0)
                    if not left:
                        return
            if frame is not None and number + 1 >= 0.9 * self.frames:
                yield from [self._pixels(frame)] * len(left)
                return
        raise InvalidRequest(
            f"A video is damaged or cut off: {number + 1} of {self.frames} frames can be decoded; send it again."
        )

    def _pixels(self, frame: Any) -> NDArray[np.uint8]:
        self._check_pixels(frame.width, frame.height)
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


@contextmanager
def open_video(data: bytes, limits: VideoLimits | None = None) -> Iterator[VideoFile]:
    """Raises InvalidRequest, one sentence, for what is no video that can be read, or is larger than `limits`."""
    av, limits = _library(), limits or VideoLimits()
    if len(data) > limits.bytes:
        raise InvalidRequest(f"A video has more than {limits.bytes >> 20} MiB; send a shorter or smaller one.")
    options = {"codec_whitelist": ",".join(_CODECS), "protocol_whitelist": "none"}
    with _one_sentence():
        container = av.open(BytesIO(data), format=_container(data), options=options)
    try:
        with _one_sentence():
            opened = VideoFile(container, limits)
        yield opened
    finally:
        container.close()


def _library() -> ModuleType:
    try:
        import av
    except ImportError:
        raise InvalidRequest(
            "Videos are not read here, since PyAV is not installed: it comes with `pip install octavo[video]`; or send images."
        ) from None
    return av


def _container(data: bytes) -> str:
    """FFmpeg's name of what the bytes begin with."""
    if data[4:8] in _BOXES:
        return "mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    raise InvalidRequest(f"A video's bytes are of no format that is read here, or damaged; known are {_KNOWN}.")


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Damaged files make FFmpeg's decoders raise errors of many kinds."""
    try:
        yield
    except InvalidRequest:
        raise
    except Exception as error:
        if type(error) is MemoryError:  # Python's own; FFmpeg's decoders say so of damaged sizes
            raise
        told = (str(getattr(error, "strerror", None) or error).strip() or type(error).__name__).splitlines()[0][:100]
        raise InvalidRequest(f"A video is damaged or cut off ({told.rstrip('.')}); send it again.") from None
