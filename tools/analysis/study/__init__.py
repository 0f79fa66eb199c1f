"""Behind ``tools/analysis/evidence.py``: what pre-training is worth, on the demo's data."""
