"""What a run needs, from shapes alone: bytes, FLOPs and time, without torch and without a GPU."""
