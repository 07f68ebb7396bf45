"""Pictures of runs and models.

Read inspection.py (the numbers), figures.py and text_plots.py (the drawings), run_report.py and html_report.py
(report.html). It must never compute in a drawing, nor draw what cannot be told apart without colours.
"""
