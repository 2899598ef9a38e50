"""Parity with TRL is no part of `make test`: `make parity` makes the peers and names this folder's files."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("KOTAE_PARITY") else ["test_*.py"]
