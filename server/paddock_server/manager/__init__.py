"""The models of this server: who is loaded, who gets in, who has to go.

manager      what the RPCs call; finds the model and awaits its answer
replica_set  a model: one replica or several; replicas decides for them, pure
actor        one task per replica, the only writer of its state; carries out what was decided
transitions  the state machine of a replica, pure; asking and turn are its parts
loop         one task for admission, eviction and the queue for room
prediction   what a load will take, before it has begun; measured what earlier ones took
residency    its books; policy its decision, pure; admission the budget behind it
run          one worker from start to end, in tasks beside the actor
progress     a load as its callers see it; events the watch over all models
sources      what the catalog gives, and reloads say of it
desired      what comes back after a restart
"""

from __future__ import annotations

from paddock_server.manager.admission import Admission, MemoryAdmission
from paddock_server.manager.config import ManagerConfig, Settings
from paddock_server.manager.lease import Lease
from paddock_server.manager.manager import ModelManager
from paddock_server.manager.measured import Measurements
from paddock_server.manager.prediction import MemoryPredictor
from paddock_server.manager.run import LiveWorker, WorkerLauncher
from paddock_server.manager.snapshot import Listing

__all__ = [
    "Admission",
    "Lease",
    "Listing",
    "LiveWorker",
    "ManagerConfig",
    "Measurements",
    "MemoryAdmission",
    "MemoryPredictor",
    "ModelManager",
    "Settings",
    "WorkerLauncher",
]
