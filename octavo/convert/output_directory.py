"""The directory of a checkpoint that is being written: claimed, filled, and whole once it has a config.json.

A file of notes says whose unfinished work a directory is. The same command continues it; another is refused, and so is any
directory that holds something else. Of a finished one, a file says what it was made of.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from octavo.convert.output_file import OutputFile, write_error, write_json
from octavo.errors import OctavoError
from octavo.files import KEY_ROUNDING
from octavo.version import __version__
from octavo.weights.checkpoint import INDEX, Checkpoint

__all__ = ["MARKER", "ORIGIN", "STASH", "OutputDirectory", "StashBytes"]

MARKER = ".octavo-quantize.json"
ORIGIN = ".octavo-origin.json"
STASH = ".octavo-calibrated"  # a folder of codes of layers, until the files that take them are whole
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack", ".gguf",
           ".onnx", ".onnx_data", ".tflite", ".ot", ".partial", Path(KEY_ROUNDING).suffix}  # fmt: skip
REPLACED = {"config.json", "hf_quant_config.json", INDEX}


class StashBytes(NamedTuple):
    """What calibration writes beside the files. kept: until these are whole. states: while it computes, before any is begun."""

    kept: int = 0
    states: int = 0


class OutputDirectory:
    """The directory `path`, this process's alone between entry and exit. Raises OctavoError where it may not be used.

    `job` is what must be the same for a run to continue another one's work. `flag` is the option that names the directory.
    """

    def __init__(
        self,
        path: Path,
        source: Checkpoint,
        files: Mapping[str, OutputFile],
        job: Mapping[str, Any],
        flag: str = "-o",
        beside: StashBytes = StashBytes(),  # noqa: B008 (it is never changed)
    ):
        self.path, self.source, self.flag, self.beside = path, source, flag, beside
        there = self._nearest()
        if not there.is_dir():
            below = "" if there == path.absolute() else f", so there can be no {path}"
            raise OctavoError(f"{there if below else path} is a file{below}; give {flag} a new directory.")
        self.stash = path / STASH
        self.files = {name: file for name, file in files.items() if file.tensors}
        stats = {name: os.stat(source.directory / name) for name in ("config.json", *source.files)}
        self.job = {
            "octavo": __version__,
            "model": str(source.directory.resolve()),
            **job,
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }

    def __enter__(self) -> Self:
        self._check_room()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_contents()
            self._marker = open(self.path / MARKER, "a+", encoding="utf-8")
            try:
                self._claim(self._marker)
            except BaseException:
                self._marker.close()
                raise
        except OSError as error:
            raise write_error(error, self.path) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):
            if kind is None:
                shutil.rmtree(self.stash, ignore_errors=True)
            nothing = len(self.unfinished()) == len(self.files) and not self.stash.exists()
            if kind is None or nothing:  # done, or nothing to continue with
                (self.path / MARKER).unlink()
            if kind is not None:
                self.path.rmdir()  # if it is empty
        self._marker.close()

    def unfinished(self) -> list[str]:
        """The files that are still to be written."""
        return [name for name, file in self.files.items() if not file.finished()]

    def is_complete(self) -> bool:
        """Whether it holds all of this job's work. Raises OctavoError if it holds a checkpoint that is of another."""
        if not (self.path / "config.json").exists():
            return False
        try:
            origin: dict[str, Any] = json.loads((self.path / ORIGIN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise OctavoError(
                f"{self.path} holds a checkpoint not made of {self.source.directory}; give {self.flag} a new directory."
            ) from None
        # The version that wrote it may be another: codes mean the same to every one.
        if changed := [key for key in {**self.job, **origin} if key != "octavo" and origin.get(key) != self.job.get(key)]:
            raise OctavoError(
                f"{self.path} holds a checkpoint that was made of something else or with other settings ('{changed[0]}' "
                f"differs); give {self.flag} another directory, or remove that one."
            )
        if damaged := self.unfinished():
            raise OctavoError(f"{self.path / damaged[0]} is missing or cut short; remove {self.path}, and it is written anew.")
        return True

    def _nearest(self) -> Path:
        """The path, or of those above it the first that exists."""
        path = self.path.absolute()
        return next(place for place in (path, *path.parents) if place.exists())

    def _check_contents(self) -> None:
        names = {path.name for path in self.path.iterdir()}
        if names and MARKER not in names:
            raise OctavoError(
                f"{self.path} is not empty and holds no unfinished work of this kind; give {self.flag} a new directory."
            )

    def _claim(self, marker: IO[str]) -> None:
        """Lock the file of notes, write into a new one, and remove what an earlier run left that is of no use."""
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OctavoError(f"another process is writing to {self.path}; wait for it, or give {self.flag} another.") from None
        marker.seek(0)
        text, boot = marker.read(), _boot()
        noted: dict[str, Any] = json.loads(text) if text.endswith("\n") else {}
        if noted and noted["job"] != self.job:
            changed = next(key for key in {**self.job, **noted["job"]} if noted["job"].get(key) != self.job.get(key))
            raise OctavoError(
                f"{self.path} holds unfinished work of another command or version ('{changed}' differs); "
                f"give {self.flag} another directory, or remove that one."
            )
        if not noted or noted["boot"] != boot:  # files named just before a power cut may lack their contents
            for name in self.files:
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.stash, ignore_errors=True)
            marker.truncate(0)
            marker.write(json.dumps({"job": self.job, "boot": boot}) + "\n")
            marker.flush()
        for left in self.path.glob("*.partial"):
            left.unlink()

    def _check_room(self) -> None:
        files = sum(self.files[name].nbytes for name in self.unfinished())
        needed = self.beside.kept + max(files, self.beside.states)
        partial = [file.partial for file in self.files.values() if file.partial.exists()]
        left = sum(path.stat().st_size for path in (*partial, *self.stash.glob("*")))
        free = shutil.disk_usage(self._nearest()).free + left
        if free < needed:
            raise OctavoError(
                f"{self.path} needs {needed:,} bytes and its disk has {free:,} free; free {needed - free:,} more, "
                f"or give {self.flag} a directory on another disk."
            )

    def finish(self, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> None:
        """Add what is not weights: copies of the other files, the index, and last config.json.

        How keys are rounded is of the model and not of its codes, so the source's goes along where no other was measured.
        """
        for path in _other_files(self.source.directory):
            _copy(path, self.path / path.relative_to(self.source.directory))
        rounding = self.source.directory / KEY_ROUNDING
        if rounding.is_file() and not (self.path / KEY_ROUNDING).exists():
            _copy(rounding, self.path / KEY_ROUNDING)
        weight_map = {tensor: name for name, file in self.files.items() for tensor in file.tensors}
        if set(self.files) != {"model.safetensors"}:
            total = sum(tensor.nbytes for file in self.files.values() for tensor in file.tensors.values())
            write_json(self.path / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        write_json(self.path / ORIGIN, self.job)
        self._sync()  # a power cut must not leave a config.json beside files whose contents were still on their way
        write_json(self.path / "config.json", {**_plain(config), "quantization_config": dict(quantization)})

    def _sync(self) -> None:
        for place in (*(self.path / name for name in self.files), *self.path.glob(KEY_ROUNDING), self.path):
            try:
                descriptor = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise write_error(error, place) from None


def _boot() -> str:
    """What changes when the machine starts anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without any description of quantized weights."""
    left = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in left.items()}


def _other_files(directory: Path) -> Iterator[Path]:
    """Tokenizer, chat template, licence and the like: no weights in any format, and no folder that holds some."""
    for folder, folders, names in os.walk(directory):
        paths = [Path(folder) / name for name in sorted(names)]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(folder) != directory and any(path.suffix in WEIGHTS for path in paths):
            folders.clear()
            continue
        yield from (
            path
            for path in paths
            if path.suffix not in WEIGHTS
            and path.name not in REPLACED
            and not path.name.startswith(".")
            and not path.name.endswith((".bin.index.json", ".safetensors.index.json"))
        )


def _copy(source: Path, target: Path) -> None:
    """Raises OctavoError that says which of the two is at fault."""
    try:
        found = source.stat()
        if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for ever
            raise OctavoError(f"{source} is no file, so it cannot be copied; move it elsewhere.")
        with open(source, "rb"):
            pass
    except OSError as error:
        raise OctavoError(f"{source} cannot be read: {error.strerror}.") from None
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial)
        partial.replace(target)
    except OSError as error:
        raise write_error(error, target, found.st_size) from None
