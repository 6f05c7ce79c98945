"""The only door to MLflow: the mirror that people look at while a run goes on.

The records of a run are its truth; what stands here copies them to a tracking store from a background thread.
A store that is away, slow or broken costs one warning and nothing else.
"""

from dlrscale.tracking.pages import serve
from dlrscale.tracking.store import default_uri, prepare, resolve, shown, silence, sqlite_path
from dlrscale.tracking.tracker import Tracker

__all__ = ["Tracker", "default_uri", "prepare", "resolve", "serve", "shown", "silence", "sqlite_path"]
