"""The library of this repository: everything that the scripts at the top are made of.

The packages, from the ground up; each imports only what stands before it: files here (errors, files, config_checks, output,
help, cli, tables, hub, config_io, device, distributed, openmp, pool, stopping, json_rows, sample_prompts; int8_rounding; rope;
loss, norm, cache, positions and gpt2_backbone, which model.py is made with), tokenization, data, generation, sandbox, evaluation,
runs, int8, formats, plots, training. No file here imports a script. config.py and presets.py stand below all of it but errors.py,
config_checks.py and files.py, model.py between data and generation.
"""
