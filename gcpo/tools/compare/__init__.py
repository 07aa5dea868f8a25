"""Compares methods over tasks and seeds.

``gcpo compare experiment.yaml`` trains every method on every task with every seed and writes tables with 95 % intervals
and figures. A run that is there already is not repeated. ``gcpo compare experiment.yaml --tables-only`` only reads.
"""
