"""llama.cpp's server, from the package `xllamacpp`, which has it built: serving.py runs this with a Python that has the package.

    pip install xllamacpp                                                  # in an environment of its own
    python benchmarks/serving.py --llama THAT-ENVIRONMENT/bin/python

Its flags are those of llama.cpp's `llama-server` that serving.py uses.
"""

from __future__ import annotations

import argparse
import signal


def main() -> None:
    """Serve until the process is ended."""
    import xllamacpp

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    for flag in ("--port", "--ctx-size", "--parallel", "--threads"):
        parser.add_argument(flag, type=int, required=True)
    flags = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_ctx, params.n_parallel = (
        flags.model,
        flags.port,
        flags.ctx_size,
        flags.parallel,
    )
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = flags.threads
    server = xllamacpp.Server(params)
    print(f"{server.listening_address}; {xllamacpp.get_system_info()}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
