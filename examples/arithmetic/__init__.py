"""The embedded task: arithmetic questions, and a small model that is warmed up on them."""
