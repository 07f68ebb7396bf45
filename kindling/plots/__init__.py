"""Pictures of runs and models.

Read inspection.py (the numbers), held_out.py (which text is drawn), comparable.py (which runs compare), figures.py,
text_plots.py, scaling_figures.py and stage_figures.py (the drawings), then run_report.py and html_report.py (report.html). A
drawing must never compute anything, and must never depend on colours alone.
"""
