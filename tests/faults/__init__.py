"""Faults injected into the real scripts, at scale: `make test-faults`. Each file is one kind of fault, and under two minutes."""
