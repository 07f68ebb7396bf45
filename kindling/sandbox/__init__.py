"""Runs Python that nobody has read.

Read process.py (starts a program and asks it for values), bubblewrap.py (what the program sees), worker.py (the inside),
syscall_filter.py (refused kernel calls) and self_test.py (tries whether it holds). It must never hand a program what it is
expected to answer, nor believe what it says of itself.
"""
