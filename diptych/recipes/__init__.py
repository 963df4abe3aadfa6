"""Recipes: one module per task, holding the task's configuration class and the functions that return whole runs.

No torch here: `diptych recipes`, search spaces and bad calls must answer at once. A recipe's docstring says source,
command, hardware and expected result.
"""
