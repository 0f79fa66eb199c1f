"""Behind ``tools/analysis/evidence.py``: what pre-training is worth, measured on the demo's data."""
