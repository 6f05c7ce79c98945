"""Predict a run's memory and time without a GPU: torch-free, exact integers, term by term (docs/memory-model.md)."""
