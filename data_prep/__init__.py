"""Data sets of mathematics and programs in verl's schema: ``python -m data_prep SET``."""
