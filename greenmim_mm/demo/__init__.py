"""The demo: a small, real data set on which the whole pipeline runs without a download."""
