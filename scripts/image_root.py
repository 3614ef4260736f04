"""Does an image's build steps in a plain directory, runs it there as its user, and asks it for a completion.

    sudo python scripts/image_root.py docker/cpu.Dockerfile --work /var/tmp/image -- --quantization ptpc_fp8

For a machine without a container engine or a registry. Needs root, Debian's debootstrap, and unshare. A stage FROM debian:12
begins as debootstrap's minimal system of that release, which Debian's image is made of, too; other bases are refused. The
instructions are done one by one in a chroot, in namespaces of their own for mounts and processes, with the host's network.

It prints how long each step took, the size of the result, how long the image took to be healthy by its own HEALTHCHECK, a
completion, and the exit code after its STOPSIGNAL. A package mirror's needs are handed in: --env PIP_INDEX_URL=…, --bind FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RELEASES = {"11": "bullseye", "12": "bookworm", "13": "trixie"}
SOURCE = Path(__file__).resolve().parents[1]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MINUTES = 10  # within which the server must be healthy


@dataclass
class Stage:
    """A root directory, and what the instructions so far have set."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "0:0"
    directory: str = "/"
    shell: Sequence[str] = ("/bin/sh", "-c")
    entrypoint: Sequence[str] = ()
    health: Sequence[str] = ()
    stop: str = "SIGTERM"


@dataclass
class Outside:
    """What of this machine the steps see: variables, and paths that are bound into the root, read-only."""

    env: Mapping[str, str]
    binds: Sequence[str]

    def command(self, stage: Stage, words: Sequence[str]) -> list[str]:
        """The command that runs `words` in a stage's root."""
        root = shlex.quote(str(stage.root))
        mounts = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev", f"cp -L /etc/resolv.conf {root}/etc/"]
        for path in self.binds:
            place = shlex.quote(f"{stage.root}{path}")
            mounts.append(f"mkdir -p {place}" if Path(path).is_dir() else f"mkdir -p $(dirname {place}) && touch {place}")
            mounts.append(f"mount --bind -o ro {shlex.quote(path)} {place}")
        variables = [f"{key}={value}" for key, value in {**self.env, **stage.env}.items()]
        moved = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', stage.directory, *words]
        chroot = shlex.join(["chroot", f"--userspec={stage.user}", str(stage.root), "env", "-i", *variables, *moved])
        script = "; ".join([*mounts, f"exec {chroot}"])
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-ec", script]


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Each instruction with its arguments; a backslash at a line's end joins the next one."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word.upper(), rest.strip()


def base(image: str, work: Path, mirror: str) -> Path:
    """debootstrap's minimal system for a tag of `debian`, which is made once."""
    name, _, tag = image.partition(":")
    release = RELEASES.get(re.split(r"[.-]", tag)[0])
    if name != "debian" or release is None:
        sys.exit(f"{image}: debian:11, 12 and 13 can be made here; another base needs a container engine.")
    place = work / f"base-{release}"
    if not (place / "etc" / "os-release").exists():
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run(["debootstrap", "--variant=minbase", release, str(place), mirror], check=True, stdout=subprocess.DEVNULL)
    return place


def context(work: Path) -> Path:
    """The files that .dockerignore lets into the build: it excludes everything, and names what is let in."""
    place = work / "context"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    rules = (SOURCE / ".dockerignore").read_text().split()
    excluded = [rule for rule in rules if rule[0] != "!" and rule != "*"]
    for name in (rule[1:] for rule in rules if rule[0] == "!"):
        subprocess.run(["cp", "-r", "--preserve=mode,timestamps", str(SOURCE / name), str(place / name)], check=True)
    for path in [path for rule in excluded for path in place.glob(rule)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return place


def copy(stage: Stage, rest: str, stages: Mapping[str, Stage], files: Path) -> None:
    """COPY from the context or from another stage. Of a directory its content is copied."""
    options = dict(word[2:].split("=", 1) for word in shlex.split(rest) if word.startswith("--"))
    *sources, target = [word for word in shlex.split(rest) if not word.startswith("--")]
    source = stages[options["from"]].root if "from" in options else files
    place = stage.root / target.lstrip("/")
    for path in (source / name.lstrip("/") for name in sources):
        (place if path.is_dir() or target.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
        kept = "--archive" if "from" in options else "--preserve=mode,timestamps"
        subprocess.run(["cp", "-r", kept, f"{path}/." if path.is_dir() else str(path), str(place)], check=True)
    if "chown" in options:  # the names are those of the image's users
        subprocess.run(["chroot", str(stage.root), "chown", "-R", options["chown"], target], check=True)


def build(dockerfile: Path, work: Path, mirror: str, outside: Outside) -> Stage:
    """The last stage of a Dockerfile, built."""
    stages: dict[str, Stage] = {}
    files, stage = context(work), Stage(work)
    for word, rest in instructions(dockerfile):
        began = time.monotonic()
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stage = Stage(work / f"stage-{len(stages)}")
            stages[name or "last"] = stage
            shutil.rmtree(stage.root, ignore_errors=True)
            subprocess.run(["cp", "-a", str(base(image, work, mirror)), str(stage.root)], check=True)
        elif word == "RUN":
            words = json.loads(rest) if rest.startswith("[") else [*stage.shell, rest]
            done = subprocess.run(outside.command(stage, words), capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"RUN {rest}\n{done.stdout[-3000:]}{done.stderr[-3000:]}\nended with {done.returncode}")
        elif word == "COPY":
            copy(stage, rest, stages, files)
        elif word in ("ENV", "ARG"):
            pairs = dict(pair.split("=", 1) for pair in shlex.split(rest))
            stage.env |= {key: outside.env.get(key, value) if word == "ARG" else value for key, value in pairs.items()}
        elif word == "HEALTHCHECK":
            stage.health = json.loads(rest.partition("CMD ")[2])
        elif word in ("SHELL", "ENTRYPOINT"):
            setattr(stage, word.lower(), json.loads(rest))
        elif word in ("USER", "WORKDIR", "STOPSIGNAL"):
            setattr(stage, {"USER": "user", "WORKDIR": "directory", "STOPSIGNAL": "stop"}[word], rest)
        elif word not in ("EXPOSE", "VOLUME"):
            sys.exit(f"{word} is no instruction that this script does.")
        print(f"{time.monotonic() - began:7.1f} s  {word} {rest[:90]}", flush=True)
    return stage


def try_out(stage: Stage, outside: Outside, arguments: Sequence[str]) -> int:
    """Starts the image, waits until it is healthy, asks it for a completion and stops it. Returns its exit code."""
    began = time.monotonic()
    server = subprocess.Popen(outside.command(stage, [*stage.entrypoint, *arguments]))
    try:
        while subprocess.run(outside.command(stage, stage.health), capture_output=True).returncode:
            if server.poll() is not None or time.monotonic() - began > 60 * MINUTES:
                sys.exit(f"the server did not become healthy; its exit code: {server.poll()}")
            time.sleep(0.5)
        print(f"{time.monotonic() - began:7.1f} s  until HEALTHCHECK was content", flush=True)
        body = json.dumps({"prompt": "def read(self", "max_tokens": 24, "temperature": 0}).encode()
        request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            print("completion:", json.load(answer)["choices"][0]["text"], flush=True)
        child = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()[0]  # the image's first process
        os.kill(int(child), signal.Signals[stage.stop])
        return server.wait(timeout=60)
    finally:
        server.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="directory for the roots; about 5 GB")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="where debootstrap takes packages from")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the build's steps and its ARGs")
    parser.add_argument("--bind", action="append", default=[], metavar="PATH", help="a path of this machine that the steps see")
    parser.epilog = "What follows -- are arguments of the server."
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    args.work.mkdir(parents=True, exist_ok=True)
    outside = Outside(dict(pair.split("=", 1) for pair in args.env), args.bind)
    stage = build(args.dockerfile, args.work.resolve(), args.mirror, outside)
    size = subprocess.run(["du", "-sm", str(stage.root)], capture_output=True, text=True, check=True).stdout.split()[0]
    print(f"{int(size):7,} MB in the image", flush=True)
    code = try_out(stage, Outside({}, ()), sys.argv[end + 1 :])
    print(f"exit code after {stage.stop}: {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
