"""Shell completion: what is offered, and in a real bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from server.up import free_port
from tests.stack import Stack

GUIDED = Path(sys.executable).with_name("guided")


def offered(line: str, url: str, models_dir: Path | None = None) -> list[str]:
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    environment = {**os.environ, "GUIDED_URL": url, "GUIDED_MODELS_DIR": str(models_dir or "absent")}
    environment |= {"_GUIDED_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([GUIDED], env=environment, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    return [word for word in done.stdout.split("\n") if word]


def test_a_server_is_asked(stack: Stack) -> None:
    job = stack.generate(class_label=1, steps=2)["id"]
    assert offered("guided generate --model ", stack.url) == ["tiny"]
    assert offered("guided generate --model tiny@", stack.url) == ["tiny@1"]
    assert offered("guided generate --upsample ", stack.url) == ["up"]
    assert "class 3" in offered("guided generate --model tiny --class cl", stack.url)
    assert job in offered("guided jobs ", stack.url)
    assert offered(f"guided cancel {job[:20]}", stack.url) == [job]


def test_without_a_server_the_models_folder_is_read(served_models: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert offered("guided generate --model t", url, served_models) == ["tiny"]
    assert "class 3" in offered("guided generate --model tiny --class cl", url, served_models)
    assert offered("guided jobs ", url, served_models) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("guided models verify ", ["tiny", "up"]),
        ("guided models verify tiny@", ["tiny@1"]),
        ("guided models verify absent@", []),
        ("guided sample tiny --classes al", ["all"]),
        ("guided sample tiny --classes 3,7,class", [f"3,7,class {i}" for i in range(10)]),
        ("guided sample --classes all tiny --upsample u", ["up"]),
        ("guided sample absent --classes 3,", []),
        ("guided sample tiny --dtype fl", ["float32", "float16"]),
        ("guided models import x --preset lsun_h", ["lsun_horse", "lsun_horse_nodropout"]),
        ("guided train up", ["upsampler"]),
        ("guided mod", ["models"]),
    ],
)
def test_models_and_words_on_this_machine(served_models: Path, line: str, words: list[str]) -> None:
    assert offered(line, "http://absent.example", served_models) == words


def test_samplers(served_models: Path) -> None:
    assert offered("guided sample tiny --sampler d", "", served_models) == ["ddpm", "ddim", "dpmpp_2m"]


def test_in_a_real_bash(stack: Stack, tmp_path: Path) -> None:
    environment = {"PATH": f"{GUIDED.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb"}
    environment["GUIDED_URL"] = stack.url
    installed = [str(GUIDED), "--install-completion", "bash"]
    subprocess.run(installed, env={**environment, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}, check=True)
    bash = pexpect.spawn("bash", ["-i"], env={**environment, "PS1": "$ "}, encoding="utf-8", timeout=20)
    try:
        bash.sendline("echo re''ady")
        bash.expect_exact("ready")
        bash.send("guided generate --model ti\t")
        bash.expect_exact("tiny")
        bash.send("--upsample \t")
        bash.expect_exact("up ")
    finally:
        bash.close(force=True)
