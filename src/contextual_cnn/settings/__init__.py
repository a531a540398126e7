"""The settings of a run: one frozen record for each group of conf/, with its defaults and its limits.

The records are what the parts of the program take. They import neither torch nor timm, so that a mistake in a
config is found before those are loaded, which takes seconds.
"""
