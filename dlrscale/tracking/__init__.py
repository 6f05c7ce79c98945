"""The only door to MLflow: the mirror that people look at while a run goes on.

The records of a run are its truth; what stands here copies them to a tracking store, from a background thread
while the run goes on, or afterwards from its folder. A store that is away, slow or broken costs one warning and
nothing else.
"""

from dlrscale.tracking.ended import STATES, Replayed, replay, replay_quietly, sweep
from dlrscale.tracking.folder import find, naming, tell_if_behind, write_description
from dlrscale.tracking.pages import serve
from dlrscale.tracking.store import default_uri, make_ready, prepare, resolve, shown, silence, sqlite_path
from dlrscale.tracking.tracker import Tracker

__all__ = [
    "STATES",
    "Replayed",
    "Tracker",
    "default_uri",
    "find",
    "make_ready",
    "naming",
    "prepare",
    "replay",
    "replay_quietly",
    "resolve",
    "serve",
    "shown",
    "silence",
    "sqlite_path",
    "sweep",
    "tell_if_behind",
    "write_description",
]
