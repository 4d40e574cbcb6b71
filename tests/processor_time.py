"""`pytest --processor-time SECONDS` lists the tests that take more and are not marked `slow` (docs/decisions/0113).

Processor time is the user and system time of pytest's process and of the processes that it started and waited for.
Other programs on the machine change it much less than seconds on the clock.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "list tests that are not marked slow and take more processor time, and the sums of all files and workers"
    parser.addoption("--processor-time", type=float, metavar="SECONDS", help=text)


def pytest_configure(config: pytest.Config) -> None:
    limit = config.getoption("--processor-time")
    if limit is not None:
        config.pluginmanager.register(Meter(), "processor-time-meter")
        if not hasattr(config, "workerinput"):  # the process that prints, not one of pytest-xdist's workers
            config.pluginmanager.register(Summary(limit), "processor-time-summary")


def processor_seconds() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


class Meter:
    """Adds to each report what the setup, call or teardown took, fixtures included.

    A process that a session fixture starts counts where it is waited for: in the last test of the session.
    """

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
    """Collects the reports of all tests, and prints the list at the end."""

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
