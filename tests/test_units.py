"""What starts a server and leaves it running: the systemd unit, the launchd agent, the Dockerfile."""

from __future__ import annotations

import configparser
import json
import plistlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer

from serve.commands.serving import app
from serve.config import ServeConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
UNIT, PLIST, DOCKERFILE = CONFIGS / "lathe.service", CONFIGS / "org.lathe.serve.plist", CONFIGS / "Dockerfile"
INSTRUCTIONS = {
    *("FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV", "VOLUME", "EXPOSE"),
    *("HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"),
}


def read_unit() -> dict[str, list[tuple[str, str]]]:
    """Sections, each with its settings in order: a name may come twice."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            settings = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.append((name, value))
    return sections


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, with continued lines joined."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in lines]


def flags_of_serve() -> set[str]:
    command = typer.main.get_group(app).commands["serve"]
    return {flag for option in command.params for flag in option.opts}


def command_lines() -> dict[str, Sequence[str]]:
    """How each starts a server."""
    unit = dict(read_unit()["Service"])["ExecStart"].split()
    plist = plistlib.loads(PLIST.read_bytes())["ProgramArguments"]
    docker = json.loads(dict(instructions())["ENTRYPOINT"])
    return {"systemd": unit, "launchd": plist, "docker": docker}


def test_each_starts_lathe_serve_with_flags_that_there_are():
    flags = flags_of_serve()
    assert len(flags) > 30
    for name, words in command_lines().items():
        assert Path(words[0]).name == "lathe", name
        assert words[1] == "serve", name
        assert {word for word in words if word.startswith("--")} <= flags, name


def test_each_leaves_time_to_drain():
    drain_s = ServeConfig(model="m").drain_timeout_s
    assert int(dict(read_unit()["Service"])["TimeoutStopSec"]) > drain_s
    assert plistlib.loads(PLIST.read_bytes())["ExitTimeOut"] > drain_s
    assert dict(instructions())["STOPSIGNAL"] == "SIGTERM"


def test_the_unit_is_hardened_and_reads_keys_again_when_it_is_reloaded():
    service = dict(read_unit()["Service"])
    for name in ("NoNewPrivileges", "DynamicUser", "ProtectHome", "PrivateTmp", "RestrictNamespaces"):
        assert service[name] == "yes", name
    assert (service["ProtectSystem"], service["CapabilityBoundingSet"]) == ("strict", "")
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["RestartPreventExitStatus"] == "2"
    configparser.ConfigParser(strict=True, interpolation=None).read_string(
        UNIT.read_text()
    )  # no setting twice


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    program = dict(read_unit()["Service"])["ExecStart"].split()[0]
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(program, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("plutil") is None, reason="there is no plutil here, which comes with macOS")
def test_macos_finds_nothing_wrong_with_the_agent():
    assert subprocess.run(["plutil", "-lint", str(PLIST)], check=False).returncode == 0


def test_the_agent_starts_anew_after_a_failure_alone():
    agent = plistlib.loads(PLIST.read_bytes())
    assert agent["Label"] == PLIST.stem
    assert agent["KeepAlive"] == {"SuccessfulExit": False}


def test_the_image_copies_what_is_there_and_runs_as_nobody_special():
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    for name, words in found:
        if name == "COPY":
            *sources, _ = words.split()
            assert all((ROOT / source).exists() for source in sources), words
    names = [name for name, _ in found]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert dict(found)["USER"] not in ("root", "0")
    assert "/health/live" in dict(found)["HEALTHCHECK"]


def docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


@pytest.mark.large
@pytest.mark.skipif(not docker_answers(), reason="no docker daemon answers here")
def test_the_image_builds_and_serves_help(tmp_path):
    tag = "lathe-test"
    built = subprocess.run(["docker", "build", "-f", str(DOCKERFILE), "-t", tag, str(ROOT)], check=False)
    assert built.returncode == 0
    assert subprocess.run(["docker", "run", "--rm", tag], check=False).returncode == 0
