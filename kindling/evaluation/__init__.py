"""What a model is worth: losses, code that is really run, and what was memorised.

Losses: perplexity.py. Code: code_eval.py (its steps), then tasks.py, heldout.py, samples.py, extraction.py and
check_correctness.py. Memorisation: memorization.py, verbatim.py. lm-eval's tasks: harness.py, harness_data.py,
harness_model.py. Figures: intervals.py, report.py, compare_runs.py; progress.py has the bars. It must never run generated
code outside the sandbox, nor print a figure without saying how sure it is.
"""
