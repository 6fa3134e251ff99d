"""`python -m pytest benchmarks --quick`: the tiny sizes, to see that everything works."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: does it work?")
