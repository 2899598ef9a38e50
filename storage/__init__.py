"""The facts Kotae keeps: records in SQLite, adapters in content-addressed folders, every change audited.

`assistant` and `alignment` meet only here, and nothing outside this package needs SQL: open a
`storage.store.Store` and call the functions of the topic modules. This file imports nothing on purpose.
"""
