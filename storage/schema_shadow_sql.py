"""The SQL of the migration that brings the shadow: its role among the deployments, and the table of its answers."""

from __future__ import annotations

from storage.schema_sql import APPEND_ONLY, INDEXES, append_only_triggers

DEPLOYMENTS_WITH_SHADOW = """CREATE TABLE deployments_next (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        policy_id TEXT NOT NULL REFERENCES policies (id),
        role TEXT NOT NULL CONSTRAINT role CHECK (role IN ('stable', 'canary', 'shadow', 'retired')),
        share REAL NOT NULL CONSTRAINT share CHECK (share BETWEEN 0 AND 1),
        actor TEXT NOT NULL,
        reason TEXT NOT NULL CONSTRAINT reason CHECK (reason <> ''),
        created_at REAL NOT NULL
    ) STRICT"""

SHADOW_ANSWERS = (
    """CREATE TABLE shadow_answers (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        turn_id TEXT NOT NULL REFERENCES turns (id),
        deployment_id TEXT NOT NULL REFERENCES deployments (id),
        answer TEXT NOT NULL,
        prompt_token_ids TEXT NOT NULL CONSTRAINT prompt_token_ids CHECK (json_valid(prompt_token_ids)),
        answer_token_ids TEXT NOT NULL CONSTRAINT answer_token_ids CHECK (json_valid(answer_token_ids)),
        finish_reason TEXT NOT NULL
            CONSTRAINT finish_reason CHECK (finish_reason IN ('stop', 'length', 'error', 'wrong_policy')),
        first_token_s REAL CONSTRAINT first_token_s CHECK (first_token_s >= 0),
        total_s REAL NOT NULL CONSTRAINT total_s CHECK (total_s >= 0),
        created_at REAL NOT NULL,
        UNIQUE (turn_id, deployment_id)
    ) STRICT""",
    "CREATE INDEX shadow_answers_of_deployment ON shadow_answers (deployment_id)",
)


def shadow_role() -> tuple[str, ...]:
    """Return the statements that let a deployment be a shadow: the table made anew with another constraint.

    As https://www.sqlite.org/lang_altertable.html (7) says, with its indexes and triggers; foreign keys must be off.
    """
    columns = "seq, id, policy_id, role, share, actor, reason, created_at"
    return (
        DEPLOYMENTS_WITH_SHADOW,
        f"INSERT INTO deployments_next ({columns}) SELECT {columns} FROM deployments",
        "DROP TABLE deployments",
        "ALTER TABLE deployments_next RENAME TO deployments",
        *(index for index in INDEXES if " ON deployments " in index),
        *append_only_triggers("deployments", APPEND_ONLY["deployments"]),
    )
