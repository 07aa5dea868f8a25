"""The embedded task: arithmetic questions, and a small model that is fine-tuned on worked solutions with errors."""
