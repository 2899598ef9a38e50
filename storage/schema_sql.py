"""The SQL of the first migrations, as text: tables, indexes, append-only triggers and the search index.

Constraints carry the name of their column, so that an error can name the field. Nothing here runs by itself.
"""

from __future__ import annotations

PEOPLE_TABLES = (
    """CREATE TABLE people (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL UNIQUE COLLATE NOCASE CONSTRAINT name CHECK (name <> ''),
        role TEXT NOT NULL CONSTRAINT role CHECK (role IN ('staff', 'reviewer', 'operator', 'admin')),
        created_at REAL NOT NULL,
        disabled INTEGER NOT NULL DEFAULT 0 CONSTRAINT disabled CHECK (disabled IN (0, 1))
    ) STRICT""",
    """CREATE TABLE credentials (
        seq INTEGER PRIMARY KEY,
        person_id TEXT NOT NULL UNIQUE REFERENCES people (id),
        password_hash TEXT NOT NULL,
        changed_at REAL NOT NULL
    ) STRICT""",
    """CREATE TABLE tokens (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        person_id TEXT NOT NULL REFERENCES people (id),
        label TEXT NOT NULL,
        sha256 TEXT NOT NULL UNIQUE CONSTRAINT sha256 CHECK (length(sha256) = 64),
        created_at REAL NOT NULL,
        revoked_at REAL
    ) STRICT""",
    """CREATE TABLE settings (
        seq INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        value TEXT NOT NULL CONSTRAINT value CHECK (json_valid(value)),
        changed_at REAL NOT NULL
    ) STRICT""",
    # AUTOINCREMENT remembers the highest number ever used, which shows when the newest events were removed.
    """CREATE TABLE audit_events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        subject TEXT NOT NULL,
        detail TEXT NOT NULL CONSTRAINT detail CHECK (json_valid(detail)),
        previous_sha256 TEXT NOT NULL UNIQUE CONSTRAINT previous_sha256 CHECK (length(previous_sha256) = 64),
        sha256 TEXT NOT NULL UNIQUE CONSTRAINT sha256 CHECK (length(sha256) = 64)
    ) STRICT""",
)

CHAT_TABLES = (
    """CREATE TABLE conversations (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        person_id TEXT NOT NULL REFERENCES people (id),
        title TEXT NOT NULL,
        created_at REAL NOT NULL,
        head_turn_id TEXT REFERENCES turns (id),
        external_id TEXT,
        deleted_at REAL,
        active_at REAL NOT NULL
    ) STRICT""",
    """CREATE TABLE turns (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        conversation_id TEXT NOT NULL REFERENCES conversations (id),
        parent_turn_id TEXT REFERENCES turns (id),
        person_id TEXT NOT NULL REFERENCES people (id),
        source TEXT NOT NULL CONSTRAINT source CHECK (source IN ('chat', 'compare', 'api')),
        messages TEXT NOT NULL CONSTRAINT messages CHECK (json_valid(messages)),
        answer TEXT NOT NULL,
        prompt_token_ids TEXT NOT NULL CONSTRAINT prompt_token_ids CHECK (json_valid(prompt_token_ids)),
        answer_token_ids TEXT NOT NULL CONSTRAINT answer_token_ids CHECK (json_valid(answer_token_ids)),
        policy_id TEXT NOT NULL REFERENCES policies (id),
        deployment_id TEXT NOT NULL REFERENCES deployments (id),
        sampling TEXT NOT NULL CONSTRAINT sampling CHECK (json_valid(sampling)),
        finish_reason TEXT NOT NULL
            CONSTRAINT finish_reason CHECK (finish_reason IN ('stop', 'length', 'cancelled', 'error')),
        first_token_s REAL CONSTRAINT first_token_s CHECK (first_token_s >= 0),
        total_s REAL NOT NULL CONSTRAINT total_s CHECK (total_s >= 0),
        created_at REAL NOT NULL,
        question TEXT GENERATED ALWAYS AS (json_extract(messages, '$[#-1].content')) VIRTUAL
    ) STRICT""",
)

ALIGNMENT_TABLES = (
    """CREATE TABLE runs (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        method TEXT NOT NULL,
        trigger TEXT NOT NULL CONSTRAINT trigger CHECK (trigger IN ('manual', 'cron', 'labels')),
        config TEXT NOT NULL CONSTRAINT config CHECK (json_valid(config)),
        seed INTEGER NOT NULL,
        code_version TEXT NOT NULL,
        pid INTEGER NOT NULL CONSTRAINT pid CHECK (pid > 0),
        pid_started_at REAL NOT NULL,
        started_at REAL NOT NULL,
        status TEXT NOT NULL CONSTRAINT status CHECK (
            status IN ('running', 'passed', 'refused', 'not_enough_data', 'failed', 'cancelled')),
        progress TEXT NOT NULL CONSTRAINT progress CHECK (json_valid(progress)),
        cost TEXT NOT NULL CONSTRAINT cost CHECK (json_valid(cost)),
        snapshot_id TEXT REFERENCES snapshots (id),
        finished_at REAL,
        message TEXT NOT NULL
    ) STRICT""",
    # NULL is "not a number", which SQLite cannot hold: a run that diverges still shows its curve.
    """CREATE TABLE run_metrics (
        seq INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL REFERENCES runs (id),
        name TEXT NOT NULL,
        step INTEGER NOT NULL CONSTRAINT step CHECK (step >= 0),
        value REAL,
        created_at REAL NOT NULL,
        UNIQUE (run_id, name, step)
    ) STRICT""",
    """CREATE TABLE snapshots (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        run_id TEXT NOT NULL UNIQUE REFERENCES runs (id),
        sha256 TEXT NOT NULL CONSTRAINT sha256 CHECK (length(sha256) = 64),
        cut_off REAL NOT NULL,
        item_ids TEXT NOT NULL CONSTRAINT item_ids CHECK (json_valid(item_ids)),
        counts TEXT NOT NULL CONSTRAINT counts CHECK (json_valid(counts)),
        created_at REAL NOT NULL
    ) STRICT""",
    """CREATE TABLE reward_models (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        run_id TEXT NOT NULL REFERENCES runs (id),
        sha256 TEXT NOT NULL CONSTRAINT sha256 CHECK (length(sha256) = 64),
        path TEXT NOT NULL,
        metrics TEXT NOT NULL CONSTRAINT metrics CHECK (json_valid(metrics)),
        created_at REAL NOT NULL
    ) STRICT""",
)

RELEASE_TABLES = (
    """CREATE TABLE policies (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        base_path TEXT NOT NULL,
        base_sha256 TEXT NOT NULL CONSTRAINT base_sha256 CHECK (length(base_sha256) = 64),
        adapter_path TEXT,
        adapter_sha256 TEXT CONSTRAINT adapter_sha256 CHECK (length(adapter_sha256) = 64),
        parent_id TEXT REFERENCES policies (id),
        run_id TEXT REFERENCES runs (id),
        created_at REAL NOT NULL,
        CONSTRAINT adapter_path CHECK ((adapter_path IS NULL) = (adapter_sha256 IS NULL))
    ) STRICT""",
    """CREATE TABLE evaluations (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        run_id TEXT NOT NULL REFERENCES runs (id),
        policy_id TEXT NOT NULL REFERENCES policies (id),
        incumbent_id TEXT NOT NULL REFERENCES policies (id),
        numbers TEXT NOT NULL CONSTRAINT numbers CHECK (json_valid(numbers)),
        samples TEXT NOT NULL CONSTRAINT samples CHECK (json_valid(samples)),
        passed INTEGER NOT NULL CONSTRAINT passed CHECK (passed IN (0, 1)),
        reasons TEXT NOT NULL CONSTRAINT reasons CHECK (json_valid(reasons)),
        created_at REAL NOT NULL
    ) STRICT""",
    """CREATE TABLE approvals (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        policy_id TEXT NOT NULL REFERENCES policies (id),
        person_id TEXT NOT NULL REFERENCES people (id),
        decision TEXT NOT NULL CONSTRAINT decision CHECK (decision IN ('approve', 'reject')),
        reason TEXT NOT NULL CONSTRAINT reason CHECK (reason <> ''),
        sha256 TEXT NOT NULL CONSTRAINT sha256 CHECK (length(sha256) = 64),
        created_at REAL NOT NULL
    ) STRICT""",
    """CREATE TABLE deployments (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        policy_id TEXT NOT NULL REFERENCES policies (id),
        role TEXT NOT NULL CONSTRAINT role CHECK (role IN ('stable', 'canary', 'retired')),
        share REAL NOT NULL CONSTRAINT share CHECK (share BETWEEN 0 AND 1),
        actor TEXT NOT NULL,
        reason TEXT NOT NULL CONSTRAINT reason CHECK (reason <> ''),
        created_at REAL NOT NULL
    ) STRICT""",
)

FEEDBACK_TABLES = (
    """CREATE TABLE ratings (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        turn_id TEXT NOT NULL REFERENCES turns (id),
        person_id TEXT NOT NULL REFERENCES people (id),
        verdict TEXT NOT NULL CONSTRAINT verdict CHECK (verdict IN ('up', 'down', 'retracted')),
        reasons TEXT NOT NULL CONSTRAINT reasons CHECK (json_valid(reasons)),
        comment TEXT NOT NULL,
        created_at REAL NOT NULL
    ) STRICT""",
    """CREATE TABLE comparisons (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        left_turn_id TEXT NOT NULL REFERENCES turns (id),
        right_turn_id TEXT NOT NULL REFERENCES turns (id)
            CONSTRAINT right_turn_id CHECK (right_turn_id <> left_turn_id),
        person_id TEXT NOT NULL REFERENCES people (id),
        choice TEXT NOT NULL CONSTRAINT choice CHECK (choice IN ('left', 'right', 'tie', 'both_bad')),
        strength INTEGER CONSTRAINT strength CHECK (strength BETWEEN 1 AND 3),
        propensity REAL NOT NULL CONSTRAINT propensity CHECK (propensity > 0 AND propensity <= 1),
        reasons TEXT NOT NULL CONSTRAINT reasons CHECK (json_valid(reasons)),
        created_at REAL NOT NULL
    ) STRICT""",
    """CREATE TABLE corrections (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        turn_id TEXT NOT NULL REFERENCES turns (id),
        person_id TEXT NOT NULL REFERENCES people (id),
        original TEXT NOT NULL,
        edited TEXT NOT NULL,
        created_at REAL NOT NULL
    ) STRICT""",
    """CREATE TABLE rubrics (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        version INTEGER NOT NULL CONSTRAINT version CHECK (version > 0),
        template TEXT NOT NULL CONSTRAINT template CHECK (json_valid(template)),
        person_id TEXT NOT NULL REFERENCES people (id),
        created_at REAL NOT NULL,
        UNIQUE (name, version)
    ) STRICT""",
    """CREATE TABLE judgements (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        left_turn_id TEXT NOT NULL REFERENCES turns (id),
        right_turn_id TEXT NOT NULL REFERENCES turns (id),
        judge TEXT NOT NULL,
        rubric_id TEXT NOT NULL REFERENCES rubrics (id),
        choice TEXT NOT NULL CONSTRAINT choice CHECK (choice IN ('left', 'right', 'tie', 'both_bad')),
        created_at REAL NOT NULL
    ) STRICT""",
)

FAILURES = (
    """CREATE TABLE failures (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        policy_id TEXT NOT NULL REFERENCES policies (id),
        kind TEXT NOT NULL CONSTRAINT kind CHECK (kind IN ('error', 'wrong_policy', 'engine_died')),
        created_at REAL NOT NULL
    ) STRICT""",
    "CREATE INDEX failures_of_policy ON failures (policy_id, created_at)",
)

INDEXES = (
    "CREATE INDEX conversations_active ON conversations (person_id, active_at, seq) WHERE deleted_at IS NULL",
    """CREATE UNIQUE INDEX conversations_external ON conversations (person_id, external_id)
        WHERE external_id IS NOT NULL AND deleted_at IS NULL""",
    "CREATE INDEX turns_tree ON turns (conversation_id, parent_turn_id)",
    "CREATE INDEX turns_of_parent ON turns (parent_turn_id)",
    "CREATE INDEX turns_of_person ON turns (person_id)",
    "CREATE INDEX turns_of_policy ON turns (policy_id, created_at)",
    "CREATE INDEX turns_of_deployment ON turns (deployment_id)",
    "CREATE INDEX turns_created ON turns (created_at)",
    "CREATE INDEX ratings_latest ON ratings (turn_id, person_id)",
    "CREATE INDEX ratings_created ON ratings (created_at)",
    """CREATE UNIQUE INDEX comparisons_pair ON comparisons
        (person_id, min(left_turn_id, right_turn_id), max(left_turn_id, right_turn_id))""",
    "CREATE INDEX comparisons_left ON comparisons (left_turn_id)",
    "CREATE INDEX comparisons_right ON comparisons (right_turn_id)",
    "CREATE INDEX comparisons_created ON comparisons (created_at)",
    "CREATE INDEX corrections_latest ON corrections (turn_id, person_id)",
    "CREATE INDEX corrections_created ON corrections (created_at)",
    "CREATE INDEX judgements_left ON judgements (left_turn_id)",
    "CREATE INDEX judgements_right ON judgements (right_turn_id)",
    "CREATE INDEX tokens_of_person ON tokens (person_id)",
    # At most one run is open at any time, whoever opens it.
    "CREATE UNIQUE INDEX runs_running ON runs (status) WHERE status = 'running'",
    "CREATE INDEX reward_models_of_run ON reward_models (run_id)",
    "CREATE INDEX evaluations_of_policy ON evaluations (policy_id)",
    "CREATE INDEX approvals_of_policy ON approvals (policy_id)",
    "CREATE INDEX deployments_of_policy ON deployments (policy_id)",
    "CREATE INDEX deployments_of_role ON deployments (role)",
    "CREATE UNIQUE INDEX policies_base ON policies (base_sha256) WHERE adapter_sha256 IS NULL",
    "CREATE INDEX audit_events_subject ON audit_events (subject)",
)

APPEND_ONLY: dict[str, tuple[str, ...]] = {
    "turns": ("id = NEW.id",),
    "ratings": ("id = NEW.id",),
    "comparisons": (
        "id = NEW.id",
        """person_id = NEW.person_id
            AND min(left_turn_id, right_turn_id) = min(NEW.left_turn_id, NEW.right_turn_id)
            AND max(left_turn_id, right_turn_id) = max(NEW.left_turn_id, NEW.right_turn_id)""",
    ),
    "corrections": ("id = NEW.id",),
    "judgements": ("id = NEW.id",),
    "rubrics": ("id = NEW.id", "name = NEW.name AND version = NEW.version"),
    "snapshots": ("id = NEW.id", "run_id = NEW.run_id"),
    "reward_models": ("id = NEW.id",),
    "policies": (
        "id = NEW.id",
        "NEW.adapter_sha256 IS NULL AND adapter_sha256 IS NULL AND base_sha256 = NEW.base_sha256",
    ),
    "evaluations": ("id = NEW.id",),
    "approvals": ("id = NEW.id",),
    "deployments": ("id = NEW.id",),
    "audit_events": ("sha256 = NEW.sha256", "previous_sha256 = NEW.previous_sha256"),
}
"""The evidence tables, each with its unique keys beside `seq`: REPLACE deletes by any of them."""


def append_only_triggers(table: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return the three triggers that keep `table` append-only.

    The third is needed because REPLACE deletes the row it replaces without firing a DELETE trigger.
    """
    exists = " OR ".join(f"EXISTS (SELECT 1 FROM {table} WHERE {key})" for key in ("seq = NEW.seq", *keys))
    refuse = f"BEGIN SELECT RAISE(ABORT, 'append-only: {table}'); END"
    return (
        f"CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table} {refuse}",
        f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} {refuse}",
        f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {exists} {refuse}",
    )


def moved_policy_triggers() -> tuple[str, ...]:
    """Return the statements that let only `base_path` and `adapter_path` of a policy change."""
    fixed = "seq, id, base_sha256, adapter_sha256, parent_id, run_id, created_at"
    return (
        "DROP TRIGGER policies_no_update",
        f"""CREATE TRIGGER policies_no_update BEFORE UPDATE OF {fixed} ON policies
            BEGIN SELECT RAISE(ABORT, 'append-only: policies'); END""",
    )


SEARCH = (
    """CREATE VIRTUAL TABLE turns_fts USING fts5
        (question, answer, content = 'turns', content_rowid = 'seq', tokenize = 'trigram')""",
    """CREATE TRIGGER turns_searchable AFTER INSERT ON turns BEGIN
        INSERT INTO turns_fts (rowid, question, answer) VALUES (NEW.seq, NEW.question, NEW.answer);
    END""",
)
