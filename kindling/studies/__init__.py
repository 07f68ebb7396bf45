"""The studies of study.py: each project's table again, at the size that fits the time.

Read steps.py (the steps and their runner), speed.py (how long a step takes here), sizes.py (from a project's sizes down to
smaller ones), inputs.py (the data), plan.py (what fits), shared_steps.py (steps that several studies have), then a study:
study_000.py, study_001.py, study_002.py, study_003.py or study_004.py, the last with held_out.py (texts that no stage trains
on) and measures.py (what a stage changed). run_results.py (figures from the files of runs) and report.py (tables, page) show
what came out. claims.py and audit.py recompute what the projects claim. Of the scaling law, read scaling_law.py (the fit),
scaling.py (which runs), scaling_runs.py (what each run says), scaling_results.py (tables and picture) and scaling_advice.py
(what to train here). A study must never train by itself, only start the scripts, and never show a figure without saying which
files it comes from.
"""
