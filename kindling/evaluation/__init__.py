"""Evaluates a model: losses, generated code that is really run, and memorisation.

Losses: perplexity.py; of reference solutions: gold.py. Gaps to fill in: infill.py. Code: code_eval.py (the steps), then
tasks.py, heldout.py, samples.py, extraction.py, answer_extraction.py, check_correctness.py and references.py; later, or on
another machine: grade_written.py. Memorisation: memorization.py, verbatim.py. lm-eval's tasks: harness.py, harness_data.py,
harness_model.py. Results: intervals.py, report.py, infill_report.py, results_file.py, compare_runs.py. Progress
bars: progress.py. The package must never run generated code outside the sandbox, nor print a figure without its interval or a
note why there is none.
"""
