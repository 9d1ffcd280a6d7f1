"""Defences on what a client sends, and their ledger: pure functions of arrays."""
