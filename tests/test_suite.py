"""The suite depends on the code alone: not on how the machine started it."""

import os
import signal
import subprocess
import sys

import pytest

from tests import ROOT


@pytest.fixture(scope="module")
def leaves_a_variable() -> None:
    os.environ["CAUSALRN_TEST_LEFT"] = "1"


@pytest.mark.usefixtures("leaves_a_variable")
def test_no_fixture_changes_the_environment_of_tests() -> None:
    # Those of a module are set up before what restores the environment of one test.
    assert "CAUSALRN_TEST_LEFT" not in os.environ


def test_a_test_is_interrupted_by_ctrl_c() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_background_job_is_too() -> None:
    # A shell starts background jobs with SIGINT ignored, and processes inherit that.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_suite.py"]
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command, "-k", "interrupted_by_ctrl_c"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
