"""What a run will need, derived without a GPU and without torch."""
