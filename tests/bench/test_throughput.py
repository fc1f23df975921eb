"""The benchmark of requests at a time: the same answers in every row, and a row for each number of slots."""

from __future__ import annotations

import sys

import pytest

from tests.bench import throughput


def test_rows_and_answers(monkeypatch, capsys):
    arguments = ["--shape", "small", "--precisions", "fp32", "--slots", "1", "2", "--requests", "3", "--tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments, "--threads", "1"])
    throughput.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(";")[0] for line in lines if "answers as" in line] == [
        "fp32, 1: 3 of 3 answers as one at a time",
        "fp32, 2: 3 of 3 answers as one at a time",
    ]
    rows = [line.split(" | ") for line in lines if line.startswith("| fp32")]
    assert [row[1] for row in rows] == ["1", "2"] and rows[0][3] == "1.00x"


def test_requests_are_the_same_each_time():
    assert throughput.requests(5, 2, 16, 100) == throughput.requests(5, 2, 16, 100)
    assert {len(request.ids) for request in throughput.requests(9, 2, 16, 100)} != {17}


def test_fewer_requests_than_slots(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["throughput", "--requests", "2"])
    with pytest.raises(throughput.OptionError, match="at least the slots"):
        throughput.main()
