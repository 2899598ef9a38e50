"""JSON values that operators change while Kotae runs: the schedule, the reasons offered, a secret.

The event of a change names the setting and never its value, because some are secret.
"""

from __future__ import annotations

from typing import Any

from storage.errors import InvalidField
from storage.people import require_actor
from storage.records import now
from storage.store import Store
from storage.tables import Setting


def get(store: Store, key: str, default: Any = None) -> Any:
    """Return the value kept under `key`, or `default`."""
    found = store.all(Setting, "key = ?", [key])
    return found[0].value if found else default


def put(store: Store, key: str, value: Any, actor: str) -> None:
    """Keep `value` (anything JSON) under `key`.

    Raises:
        InvalidField: an empty key or a value that is not JSON.
        NotAllowed: `actor` is neither "system" nor an operator.
    """
    require_actor(store, actor, "operator")
    if not key or len(key) > 100:
        raise InvalidField("key", key, "use 1 to 100 characters")
    with store.transaction(actor) as changes:
        changes.replace_key(Setting(key=key, value=value, changed_at=now()), "key")
        changes.audit("setting.put", key)
