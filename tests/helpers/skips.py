"""Pytest hook that fails a session in which tests were skipped, if SLOTSCOPS_NO_SKIPS is 1.

Tests that need real data may still be skipped if SLOTSCOPS_DATA is not set.
"""

import os

import pytest

NO_MOUNT = "needs the right to mount a small disk: run the tests as root"  # always allowed, as containers forbid it
NO_DATA = "needs real photos and weights: set SLOTSCOPS_DATA to their folder"


def unexpected_skips(config: pytest.Config) -> list[str]:
    """Place and reason of each skipped test that should have run; empty where skips are allowed."""
    if os.environ.get("SLOTSCOPS_NO_SKIPS") != "1":
        return []
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []  # a worker of xdist has no reporter
    reasons = [f"{report.nodeid}: {report.longrepr[2]}" for report in reports]
    reasons = [reason for reason in reasons if NO_MOUNT not in reason]
    return [reason for reason in reasons if os.environ.get("SLOTSCOPS_DATA") or NO_DATA not in reason]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if unexpected_skips(session.config) and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if skips := unexpected_skips(config):
        terminalreporter.section("tests that SLOTSCOPS_NO_SKIPS=1 does not allow to be skipped")
        for reason in skips:
            terminalreporter.write_line(reason)
