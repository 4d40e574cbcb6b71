"""`pytest --processor-time SECONDS` lists the tests that take more and are not marked `slow`: see docs/decisions/0113.

Processor time is user and system time of pytest's process and of the processes that it started and waited for. Other programs on the
machine hardly change it, and so it can be compared where seconds on the clock can't.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "list tests that are not marked slow and take more processor time, and the sums of all files and workers"
    parser.addoption("--processor-time", type=float, metavar="SECONDS", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--processor-time") is not None:
        is_worker = hasattr(config, "workerinput")
        config.pluginmanager.register(Meter(), "processor-time-meter")
        if not is_worker:
            config.pluginmanager.register(Summary(config.getoption("--processor-time")), "processor-time-summary")


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Meter:
    """Writes into each report what setup, call or teardown took, fixtures included."""

    def __init__(self) -> None:
        self.before = processor_seconds()

    def pytest_collection_finish(self) -> None:
        self.before = processor_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        report = yield
        now = processor_seconds()
        report.processor_seconds, self.before = now - self.before, now
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["processor_seconds"] = processor_seconds()


class Summary:
    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.tests: Counter[str] = Counter()
        self.slow: set[str] = set()
        self.workers: list[float] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.tests[report.nodeid] += report.processor_seconds
        if "slow" in report.keywords:
            self.slow.add(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.workers.append(getattr(node, "workeroutput", {}).get("processor_seconds", 0.0))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        write = terminalreporter.write_line
        terminalreporter.section("processor time")
        for test, seconds in self.tests.most_common():
            if seconds > self.limit and test not in self.slow:
                write(f"{seconds:7.2f} s {test}")
        files: Counter[str] = Counter()
        for test, seconds in self.tests.items():
            files[Path(test.partition("::")[0]).as_posix()] += seconds
        write("Files:")
        for file, seconds in files.most_common(20):
            write(f"{seconds:7.1f} s {file}")
        total = f"{sum(self.tests.values()):.0f} s in {len(self.tests)} tests"
        if self.workers:
            total += f"; {sum(self.workers):.0f} s in {len(self.workers)} workers with their imports and collection"
        write(total)
