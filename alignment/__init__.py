"""Recorded feedback becomes a better policy: snapshot, reward model, candidate adapter, evidence.

Meets the assistant only in `storage`. `python app.py align` runs `alignment.pipeline` in its own process.
"""
