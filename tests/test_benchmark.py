"""The benchmark that measures all of a GPU in one command goes on whatever a part of it does."""

import sys
from types import SimpleNamespace

import benchmark
import pytest
import torch


def test_a_part_that_fails_is_noted_with_what_it_printed():
    text = benchmark.run_part([sys.executable, "-c", "print('| a table |'); 1 / 0"], 60)
    assert "| a table |" in text and "exit code 1" in text and "ZeroDivisionError" in text


def test_a_part_that_hangs_is_stopped():
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    text = benchmark.run_part(command, 2)
    assert "begun" in text and "It was stopped after 2 s" in text


def test_all_parts_are_in_the_report_even_if_each_of_them_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "run_part", lambda command, limit: "It failed:\n")
    args = SimpleNamespace(out=tmp_path / "report.md", rehearse=True, only=None, minutes=1)
    benchmark.gpu(args)
    report = args.out.read_text()
    assert all(f"## {title}\n\nIt failed:" in report for title, *_ in benchmark.PARTS)
    assert torch.__version__ in report
    with pytest.raises(SystemExit, match="is there already"):
        benchmark.gpu(args)
    assert args.out.read_text() == report


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for a machine without a CUDA GPU")
def test_without_a_gpu_one_line_says_how_to_rehearse():
    with pytest.raises(SystemExit, match="--rehearse tries all of it"):
        benchmark.gpu(SimpleNamespace(rehearse=False))
