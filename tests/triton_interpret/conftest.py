"""These tests run Triton kernels in its interpreter, which is chosen when a kernel is decorated: hence a process of
their own (``pytest tests/triton_interpret``) and the variable set before anything imports triton."""

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("run tests/triton_interpret in its own pytest process: triton was imported without its interpreter", 4)
os.environ["TRITON_INTERPRET"] = "1"

from tests.interpreter import quick_reductions

quick_reductions()
