"""The groups of a run, from its rollout dump: in the terminal (``gcpo show``) and in a page (``gcpo report``)."""
