"""What the README says is so."""

import re
import subprocess

from conftest import PROGRAM, ROOT

from train_gpt2 import TrainConfig, fields

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^## {title}$(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)[1]


def test_lines_of_code_it_explains_are_there():
    code = PROGRAM.read_text(encoding="utf-8")
    quoted = re.findall(r"```python\n(.*?)```", section("How it works"), re.DOTALL)
    assert len(quoted) > 10
    for lines in quoted:
        assert lines in code, lines


def test_every_flag_is_in_the_table_with_its_default():
    table = section("The options")
    for f in filter(lambda f: f.metadata, fields(TrainConfig)):
        name = rf"--(\[no-\])?{f.name}\b" if f.type in (bool, bool | None) else rf"--{f.name}\b"
        found = re.search(rf"`{name}`(?: \(([^)]*)\))?", table)
        assert found, f.name
        stated = found[found.lastindex] if found.lastindex else None
        if stated and stated[0].isdigit():
            assert stated.startswith(str(f.default)), f.name


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci/run").read_text()
    function = script[script.index("commands() {") : script.index("environment=")]
    for heading, command in ("Run it", "python train_gpt2.py"), ("Test it", "python -m pytest tests"):
        found = subprocess.check_output(["bash", "-c", f"{function}\ncommands '{heading}'"], cwd=ROOT, text=True)
        assert found.splitlines()[-1] == command
