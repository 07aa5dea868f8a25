"""Tasks that tell methods apart: questions, noisy worked solutions, and warm-started models.

``python -m examples.tasks TASK`` makes ``data/TASK/{train,test,ood}.parquet`` and ``models/TASK-warm``.
"""
