"""Whether programs of answers can be isolated on the machine that runs the tests."""

from __future__ import annotations

import pytest

from rung.errors import PlanError
from rung.scoring.code_sandbox import require_isolation


def _missing() -> str:
    try:
        require_isolation("tests")
    except PlanError as error:
        return str(error)
    return ""


_REASON = _missing()
needs_isolation = pytest.mark.skipif(bool(_REASON), reason=f"this machine cannot isolate programs: {_REASON}")
