"""Engines: what turns messages into answers, behind one protocol."""
