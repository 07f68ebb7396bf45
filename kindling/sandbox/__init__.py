"""Runs untrusted Python.

Read process.py (starts a program and calls its functions), values.py (what is sent and what may come back), remote.py (objects
that stay with the program), bubblewrap.py (what the program can see), worker.py (runs inside the sandbox), syscall_filter.py
(forbidden system calls) and self_test.py (checks that the sandbox works). The package must never give a program the expected
answer, and never trust what a program reports about itself.
"""
