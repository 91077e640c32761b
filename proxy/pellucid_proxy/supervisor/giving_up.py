"""The supervisor's own rights, and what it finds out while it still has more."""

from __future__ import annotations

import logging
import os
import sys

from ..rights.confine import NotConfined, confine
from ..rights.table import SUPERVISOR
from ..rights.users import Separation, Unfit, separation
from .options import BAD_POLICY, REFUSED, Refusal, RunOptions

log = logging.getLogger(__name__)


def give_up_rights(options: RunOptions) -> Separation:
    """This process has a supervisor's rights and no more; returns how its workers will be kept apart. Raises Refusal."""
    try:
        found = separation(options.worker_user)
        confine(SUPERVISOR)
    except Unfit as unfit:
        raise Refusal(str(unfit), BAD_POLICY if unfit.usage else REFUSED) from unfit
    except NotConfined as err:
        raise Refusal(f"rights cannot be given up: {err}", REFUSED) from err
    for path in (sys.executable, __file__):
        if not os.access(path, os.R_OK):
            raise Refusal(
                f"rights: {path} cannot be read without DAC_OVERRIDE, which is given up; install pellucid where root may read "
                "it as owner, group or other, such as /opt/pellucid",
                REFUSED,
            )
    for lacking in found.lacking:
        log.warning("workers are not confined by all they could be: %s", lacking)
    return found
