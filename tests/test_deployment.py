"""What stands beside the package: images, deployment files and their checks by the tools that others check them with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
BIN = Path(sys.executable).parent


def told(*words: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def final_stage(path: Path) -> str:
    return path.read_text().rpartition("\nFROM ")[2]


def test_images() -> None:
    """Linted; each ends as a user that is no root, on port 8000, with the entry point and the check that the others have."""
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile", "rocm.Dockerfile"]
    told(BIN / "hadolint", *DOCKERFILES)
    for path in DOCKERFILES:
        stage = final_stage(path)
        assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", stage, re.MULTILINE), path
        assert 'ENTRYPOINT ["octavo", "serve"]' in stage
        assert "EXPOSE 8000" in stage
        assert "STOPSIGNAL SIGTERM" in stage
        assert 'VOLUME ["/home/octavo/.cache/huggingface"]' in stage
    checks = {re.search(r"HEALTHCHECK .*\n *CMD (.+)", final_stage(path))[1] for path in DOCKERFILES}  # type: ignore[index]
    (check,) = checks
    assert "http://127.0.0.1:8000/health" in json.loads(check)[2]
    bases = {base for path in DOCKERFILES for base in re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)}
    assert not [base for base in bases if ":" not in base or base.endswith(":latest")]


def test_a_build_is_given_what_it_copies() -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    given = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        name
        for path in DOCKERFILES
        for line in re.findall(r"^COPY (?!--)(.+)", path.read_text(), re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert rules[0] == "*"
    assert copied == given
    assert not [name for name in given if not (ROOT / name).exists()]


def test_kernels_that_an_image_compiles() -> None:
    """Each of octavo/ops/hopper that depends on no model, by the compiler that torch brings."""
    from octavo.ops.hopper.all_kernels import compile_all, every_kernel
    from octavo.ops.hopper.compile import missing

    assert missing() is None
    sources = [kernels.source for kernels in every_kernel()]
    found = re.findall(
        r"Kernels\(\s*\"(\w+\.cu)\"", "".join(path.read_text() for path in (ROOT / "octavo/ops/hopper").glob("*.py"))
    )
    assert set(sources) == set(found)  # some are made for several kinds of caches
    assert compile_all() == sum(len(kernels.variants) for kernels in every_kernel())


def test_kubernetes() -> None:
    """By Kubernetes' own schema; the probes and the time to drain are the server's."""
    said = told(BIN / "kubernetes-validate", "--strict", ROOT / "deploy" / "kubernetes.yaml")
    assert len(re.findall(r"passed", said)) == 3
    text = (ROOT / "deploy" / "kubernetes.yaml").read_text()
    assert len(re.findall(r"httpGet: \{ path: /health, port: http \}", text)) == 3
    assert int(re.search(r"terminationGracePeriodSeconds: (\d+)", text)[1]) > 30  # type: ignore[index]


class Reset(yaml.YAMLObject):
    """What `!reset` stands for: the value of the file before is gone."""

    yaml_tag, yaml_loader = "!reset", yaml.SafeLoader

    @classmethod
    def from_yaml(cls, loader: yaml.SafeLoader, node: yaml.Node) -> Reset:
        return cls()


def merged(first: Any, second: Any) -> Any:
    """Two compose files as one, for what these have: mappings go into one another, and another value takes the first one's
    place."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return second
    both = first | {key: merged(first.get(key), value) for key, value in second.items()}
    return {key: value for key, value in both.items() if not isinstance(value, Reset)}


def test_compose(tmp_path: Path) -> None:
    """By the specification's own schema, alone and with the file for AMD behind it; a misspelt key is refused."""
    first, rocm = (yaml.safe_load((ROOT / "deploy" / name).read_text()) for name in ("compose.yaml", "compose.rocm.yaml"))
    both = merged(first, rocm)
    service = both["services"]["octavo"]
    assert "deploy" in first["services"]["octavo"]
    assert "deploy" not in service
    assert service["build"] == {"context": "..", "dockerfile": "docker/rocm.Dockerfile"}
    assert service["command"] == first["services"]["octavo"]["command"]
    assert service["devices"] == ["/dev/kfd", "/dev/dri"]
    misspelt = merged(first, {"services": {"octavo": {"stop_grace_perriod": "60s"}}})
    paths = [tmp_path / name for name in ("first.json", "both.json", "misspelt.json")]
    for path, found in zip(paths, (first, both, misspelt), strict=True):
        path.write_text(json.dumps(found))
    check = BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"
    told(*check, *paths[:2])
    refused = subprocess.run([*check, paths[2]], capture_output=True, text=True)
    assert (refused.returncode, "stop_grace_perriod" in refused.stdout) == (1, True)


def test_prometheus() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    assert "SUCCESS" in told("promtool", "check", "config", ROOT / "deploy" / "prometheus.yml")


def test_flags_of_the_deployment_files_are_flags() -> None:
    from octavo.cli import make_parser
    from octavo.server.serve import add_arguments

    parser = make_parser("serve", add_arguments)
    text = "".join((ROOT / "deploy" / name).read_text() for name in ("kubernetes.yaml", "compose.yaml", "octavo.service"))
    flags = set(re.findall(r'"(--[\w-]+)"', text))
    assert {"--model", "--quantization", "--kv-cache-dtype"} <= flags
    assert not flags - set(parser._option_string_actions)


def test_the_script_for_a_new_gpu(tmp_path: Path) -> None:
    """On any machine: one line a step, and all that was printed; a step that fails is said and does not stop the next."""
    out = tmp_path / "found.txt"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_gpu.py", "--only", "machine", "--output", out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    assert re.search(r"^machine +ok ", text, re.MULTILINE)
    assert re.search(r"^  rms_norm +\w", text, re.MULTILINE)
