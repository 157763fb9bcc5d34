"""`python -m tests.helpers.broken_part ARGV`: training, with one part's gradient broken once.

BREAK_UPDATE and BREAK_PART name the update and its part, on whatever process has it.
"""

import math
import os

from meal_fast import train
from meal_fast.training.distributed import Mesh
from meal_fast.training.trainer import Trainer

update, part = int(os.environ["BREAK_UPDATE"]), int(os.environ["BREAK_PART"])
now = [-1]
update_policy, summed = Trainer.update_policy, Mesh.summed


def watched(self, batch, tasks):
    now[0] = tasks[0].update
    return update_policy(self, batch, tasks)


def spoilt(self, parts):
    if now[0] == update and part in parts:
        parts[part][-1].view(-1)[0] = math.nan
    return summed(self, parts)


Trainer.update_policy, Mesh.summed = watched, spoilt
train.main()
