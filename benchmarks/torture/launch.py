"""`python -m mljax.main` that says when it begins: launch.py FILE_DESCRIPTOR ARG.."""

import os
import runpy
import sys

sys.path[0] = os.getcwd()
_reports = int(sys.argv.pop(1))
os.write(_reports, b"x")
os.close(_reports)
sys.argv[0], sys.orig_argv = "-m", [sys.executable, "-m", "mljax.main", *sys.argv[1:]]
runpy.run_module("mljax.main", run_name="__main__", alter_sys=True)
