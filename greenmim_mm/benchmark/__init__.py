"""What ``tools/benchmark.py`` runs: candidates, measuring, tables. Imported by nothing else."""
