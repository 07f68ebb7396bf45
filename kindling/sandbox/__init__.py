"""Runs untrusted Python.

Read process.py (starts a program and calls its functions), arguments.py (what is sent), values.py (what may come back), finite.py
(what that may cost), remote.py (objects that stay with the program), watch.py (ends a test that walks along an answer for ever),
bubblewrap.py (what the program can see), bootstrap.py (how the worker's code gets in), worker.py (runs inside the sandbox),
worker_values.py (reads and writes values there), syscall_filter.py (forbidden system calls) and self_test.py (checks that the
sandbox works). The package must never give a program the expected answer, and never trust what a program reports about itself.
"""
