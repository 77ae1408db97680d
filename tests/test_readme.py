"""The README's commands and flags are those there are."""

import argparse
import importlib
import re
import shlex
import subprocess
from dataclasses import fields
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, TINY

from train_gpt2 import TrainConfig, main

README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGS = [field for field in fields(TrainConfig) if field.metadata]
BLOCKS = "\n".join(re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
COMMANDS = [line for line in BLOCKS.replace("\\\n", " ").splitlines() if ".py" in line]
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)


class Found(BaseException):
    """Carries a program's parser past whatever handles its errors."""


def parser_of(program):
    def found(parser, *_):
        raise Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", found), pytest.raises(Found) as e:
        importlib.import_module(program).main([])
    return e.value.args[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_parsed(command):
    words = shlex.split(command)
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    parser_of(words[program].removesuffix(".py")).parse_args(words[program + 1 :])


def test_commands_are_found():
    programs = {re.search(r"\w+\.py", command)[0] for command in COMMANDS}
    assert programs == {"train_gpt2.py", "fineweb.py", "hellaswag.py"}
    assert len(COMMANDS) > 10


def test_flags_in_the_text_exist():
    """Every `--flag` that the prose names belongs to one of the programs, or to a launcher."""
    known = set()
    for program in ("train_gpt2", "fineweb", "hellaswag"):
        for action in parser_of(program)._actions:
            known.update(action.option_strings)
    torchrun = {"--max_restarts", "--nnodes", "--shutdown-timeout", "--signals-to-handle"}
    others = {"--minutes", "--index-url"}
    named = set(re.findall(r"(?<![-\w])--[a-z][-\w]*", PROSE))
    assert named - known - torchrun - others == set()


def test_help_explains_every_flag_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in FLAGS:
        assert f"--{field.name}" in text
        assert re.search(r"[a-z]{2,} [a-z]", field.metadata["help"]), f"no phrase: {field.name}"
    for field in FLAGS:
        if field.metadata["group"]:
            assert f"\n{field.metadata['group']}:\n" in text


@pytest.mark.parametrize(
    "heading, command",
    [("Run it", "python train_gpt2.py"), ("Test it", "python -m pytest tests -n 2")],
)
def test_ci_runs_the_commands_of_the_readme(heading, command):
    script = (ROOT / ".ci/run").read_text()
    function = script[script.index("commands() {") : script.index("environment=")]
    bash = ["bash", "-c", f"{function}\ncommands '{heading}'"]
    assert subprocess.check_output(bash, cwd=ROOT, text=True).splitlines()[-1] == command


def test_shards_of_an_own_vocabulary_train_as_the_readme_shows(tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(import json.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    text = "the quick brown fox jumps over the lazy dog, é 😀\n" * 50
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    names = {}
    exec(program, names)
    shards = [np.load(path) for path in sorted(tmp_path.glob("mytokens/*.npy"), reverse=True)]
    assert all(shard.dtype == np.uint16 for shard in shards) and shards[0][0] == 0
    assert names["bpe"].decode(np.concatenate(shards).tolist()) == text
    size = names["bpe"].get_vocab_size()
    assert main(TINY + ["--data=mytokens", "--log_dir=log", "--max_steps=2"]) == 0
    assert re.search(rf"vocab_size +{size}\n", capsys.readouterr().out)
